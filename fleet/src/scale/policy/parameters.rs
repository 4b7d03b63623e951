//! The numbers of a policy by name, so that the command line can set them and a search can walk them.

/// One number of a policy.
pub struct Parameter<P: 'static> {
    /// Its name on the command line.
    pub name: &'static str,
    /// What it says, in a few words.
    pub meaning: &'static str,
    /// Reads it.
    pub get: fn(&P) -> f64,
    /// Sets it.
    pub set: fn(&mut P, f64),
    /// The least that makes sense.
    pub min: f64,
    /// The most that makes sense.
    pub max: f64,
}

/// A policy whose numbers have names.
pub trait Parameters: Sized + 'static {
    /// The policy's name on the command line.
    const NAME: &'static str;

    /// Its numbers.
    fn parameters() -> &'static [Parameter<Self>];
}

/// Implements [`Parameters`] for fields that are all `f64`: `field "name" min..=max "meaning"`.
macro_rules! parameters {
    ($policy:ident $name:literal { $($field:ident $parameter:literal $min:literal..=$max:literal $meaning:literal),* $(,)? }) => {
        impl $crate::scale::policy::parameters::Parameters for $policy {
            const NAME: &'static str = $name;

            fn parameters() -> &'static [$crate::scale::policy::parameters::Parameter<$policy>] {
                &[$($crate::scale::policy::parameters::Parameter {
                    name: $parameter,
                    meaning: $meaning,
                    get: |policy| policy.$field,
                    set: |policy, value| policy.$field = value,
                    min: $min,
                    max: $max,
                }),*]
            }
        }
    };
}
pub(crate) use parameters;
