//! The step-time model of a continuous batch (stub, being written).
