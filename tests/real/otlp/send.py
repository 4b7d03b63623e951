"""Sends spans of every vocabulary with OpenTelemetry's own exporters: send.py HTTP_ENDPOINT GRPC_ENDPOINT TOKEN.

Fails when an exporter says that it failed. What must arrive is checked by the test that starts this.
"""

import sys

from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http import Compression as HttpCompression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult, SimpleSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode
from grpc import Compression as GrpcCompression


class Watched(SpanExporter):
    """An exporter whose failures end this program."""

    def __init__(self, exporter, name):
        self.exporter, self.name, self.failed = exporter, name, False

    def export(self, spans):
        result = self.exporter.export(spans)
        self.failed |= result is not SpanExportResult.SUCCESS
        return result

    def shutdown(self):
        self.exporter.shutdown()


def tell(tracer):
    """One of each: what an application, its libraries and its engine say, and two spans that are no model call."""
    with tracer.start_as_current_span("invoke_agent tutor") as agent:
        agent.set_attribute("gen_ai.operation.name", "invoke_agent")
        agent.set_attribute("gen_ai.usage.input_tokens", 99999)
        with tracer.start_as_current_span("chat gpt-x", kind=SpanKind.CLIENT) as call:
            call.set_attributes({
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "openai",
                "gen_ai.request.model": "gpt-x",
                "gen_ai.response.id": "chatcmpl-1",
                "gen_ai.response.finish_reasons": ["stop"],
                "gen_ai.conversation.id": "conv-1",
                "gen_ai.agent.name": "tutor",
                "user.id": "u-7",
                "gen_ai.usage.input_tokens": 2006,
                "gen_ai.usage.output_tokens": 300,
                "gen_ai.usage.cache_read.input_tokens": 1920,
                "gen_ai.usage.reasoning.output_tokens": 192,
                "gen_ai.input.messages": '[{"role":"user","parts":[{"content":"prompt text"}]}]',
                "gen_ai.prompt.0.content": "prompt text",
            })
            call.add_event("gen_ai.user.message", {"content": "prompt text"})
        with tracer.start_as_current_span("POST", kind=SpanKind.CLIENT) as request:
            request.set_attribute("http.request.method", "POST")
    with tracer.start_as_current_span("llm_request", kind=SpanKind.SERVER) as engine:
        engine.set_attributes({
            "gen_ai.request.id": "cmpl-9a-0",
            "gen_ai.latency.time_in_queue": 0.01,
            "gen_ai.latency.time_in_model_decode": 1.25,
            "gen_ai.latency.e2e": 1.5,
            "gen_ai.usage.prompt_tokens": 12,
            "gen_ai.usage.completion_tokens": 3,
        })
    with tracer.start_as_current_span("ChatCompletion") as inference:
        inference.set_attributes({
            "openinference.span.kind": "LLM",
            "llm.model_name": "inference-x",
            "llm.token_count.prompt": 100,
            "llm.token_count.completion": 20,
            "llm.token_count.prompt_details.cache_read": 64,
            "input.value": "prompt text",
        })
    with tracer.start_as_current_span("openai.embeddings") as embedding:
        embedding.set_attributes({
            "llm.request.type": "embedding",
            "gen_ai.request.model": "embed-x",
            "gen_ai.usage.prompt_tokens": 8,
            "llm.usage.total_tokens": 8,
        })
    with tracer.start_as_current_span("chat failing-x") as failing:
        failing.set_attributes({"gen_ai.operation.name": "chat", "gen_ai.request.model": "failing-x"})
        failing.set_status(Status(StatusCode.ERROR, "prompt text"))


def main(http, grpc, token):
    bearer = {"authorization": f"Bearer {token}"}
    exporters = {
        "http": HttpExporter(endpoint=http, headers=bearer),
        "http-gzip": HttpExporter(endpoint=http, headers=bearer, compression=HttpCompression.Gzip),
        "grpc": GrpcExporter(endpoint=grpc, insecure=True, headers=bearer),
        "grpc-gzip": GrpcExporter(endpoint=grpc, insecure=True, headers=bearer, compression=GrpcCompression.Gzip),
    }
    failed = []
    for name, exporter in exporters.items():
        attributes = {"service.name": name, "farthing.team": "search", "farthing.engine": "shared-0"}
        provider = TracerProvider(resource=Resource.create(attributes))
        watched = Watched(exporter, name)
        provider.add_span_processor(SimpleSpanProcessor(watched))
        tell(provider.get_tracer("farthing-real-otlp"))
        provider.shutdown()
        failed += [name] if watched.failed else []
    if failed:
        sys.exit(f"not exported: {', '.join(failed)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
