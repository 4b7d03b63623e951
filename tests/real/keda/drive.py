"""KEDA's side of the external scaler against `farthing serve`: all four methods, with a client generated from the contract.

Prints what was checked and `N passed, N failed`; ends with status 1 when anything failed."""

import argparse
import http.server
import importlib
import json
import pathlib
import queue
import shutil
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import grpc
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from checks import Checks
from processes import Farthing, free_port

METRIC = "farthing-replicas"
PATIENCE_S = 60


class Engine(http.server.BaseHTTPRequestHandler):
    """Answers like an engine that has nothing to do."""

    def do_GET(self):
        text = """# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="tiny"} 0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{model_name="tiny"} 0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{model_name="tiny"} 0
"""
        self.answer(text if self.path == "/metrics" else "{}", "text/plain")

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
        choice = {"index": 0, "message": {"role": "assistant", "content": "yes"}, "finish_reason": "stop"}
        body = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "tiny", "choices": [choice], "usage": usage}
        self.answer(json.dumps(body), "application/json")

    def answer(self, text, kind):
        body = text.encode()
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Replica:
    """An engine that comes and goes."""

    def __init__(self, port):
        self.port, self.server = port, None

    def start(self):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Engine)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


def config(keda, steady, asleep):
    """Two deployments behind KEDA: one that always has three replicas, and one that has none until somebody asks."""
    def upstream(name, port):
        return f"""
[[upstream]]
name = "{name}"
kind = "vllm"
base_url = "http://127.0.0.1:{port}"
pool = "shared"
deployment = "{name}"
engine = {{ replica = "{name}" }}

[[route]]
model = "{name}"
targets = [{{ upstream = "{name}" }}]

[[scale]]
deployment = "{name}"
pool = "shared"
upstreams = ["{name}"]
mode = "act"
policy = "static"
gpus = 1
decide_every_ms = 1000
cold_start_s = 4
objective = {{ ttft_ms = 2000, tpot_ms = 200, percentile = 0.9 }}
capacity = {{ requests_per_s = 4, input_tokens = 30, output_tokens = 40, batch = 4 }}
guards = {{ stabilise_s = 2, zero_after_s = 2, down_per_minute = 60 }}
actuator = {{ kind = "keda" }}
"""
    return f"""
[scaling]
keda_listen = "127.0.0.1:{keda}"

[[gpu]]
name = "host"
bf16_tflops = 2
gb_per_s = 40
memory_gb = 8

[[pool]]
name = "shared"
owner = "platform"
gpu = "host"
gpus = 6
usd_per_gpu_hour = "3.60"
replicas = [{{ name = "steady", gpus = 3 }}, {{ name = "asleep", gpus = 3 }}]

[telemetry]
scrape_every_ms = 500
{upstream("steady", steady)}floor = 3
ceiling = 3
static_replicas = 3
{upstream("asleep", asleep)}floor = 0
ceiling = 3
static_replicas = 0
"""


def compiled(proto, folder):
    """The file's descriptor, and the modules generated from it in `folder`."""
    folder.mkdir()
    described = folder / "described"
    arguments = ["protoc", f"-I{proto.parent}", f"--descriptor_set_out={described}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main([*arguments, proto.name]) != 0:
        raise SystemExit(f"{proto} does not compile")
    return descriptor_pb2.FileDescriptorSet.FromString(described.read_bytes()).file[0]


def spoken(file):
    """What goes over the wire: fields with number, type and name, and methods with both sides."""
    said = {f"{file.package}.{service.name}/{method.name}": (method.input_type, method.output_type, method.client_streaming, method.server_streaming)
            for service in file.service for method in service.method}
    for message in file.message_type:
        for part in [message, *message.nested_type]:
            for field in part.field:
                said[f"{message.name}.{part.name}.{field.name}"] = (field.number, field.type, field.label, field.type_name)
    return said


class Stream:
    """What StreamIsActive says, as it says it."""

    def __init__(self, call):
        self.call, self.said = call, queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        try:
            for answer in self.call:
                self.said.put(answer.result)
            self.said.put("end")
        except grpc.RpcError as error:
            self.said.put(error.code())

    def next(self):
        try:
            return self.said.get(timeout=PATIENCE_S)
        except queue.Empty:
            return "nothing"


def code(call):
    """The status code of a call that may fail."""
    try:
        call()
        return grpc.StatusCode.OK
    except grpc.RpcError as error:
        return error.code()


def until(found, wanted):
    """The last that was found, as soon as it is what is wanted."""
    end = time.monotonic() + PATIENCE_S
    while True:
        last = found()
        if last == wanted or time.monotonic() > end:
            return last
        time.sleep(0.1)


def post(url, body, key=None):
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S * 2) as answer:
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def drive(checks, farthing, admin, keda, messages, stubs, replica):
    stub = stubs.ExternalScalerStub(grpc.insecure_channel(f"127.0.0.1:{keda}"))

    def of(deployment, **more):
        metadata = {"scalerAddress": f"127.0.0.1:{keda}", "deployment": deployment} | more
        return messages.ScaledObjectRef(name="engines", namespace="inference", scalerMetadata=metadata)

    def metrics(deployment, name=METRIC, **more):
        request = messages.GetMetricsRequest(scaledObjectRef=of(deployment, **more), metricName=name)
        return [(value.metricName, value.metricValue, value.metricValueFloat) for value in stub.GetMetrics(request, timeout=PATIENCE_S).metricValues]

    checks.equal("the first decision comes", until(lambda: code(lambda: metrics("steady")), grpc.StatusCode.OK), grpc.StatusCode.OK)
    specs = [(spec.metricName, spec.targetSize, spec.targetSizeFloat) for spec in stub.GetMetricSpec(of("steady")).metricSpecs]
    checks.equal("GetMetricSpec", specs, [(METRIC, 1, 1.0)])
    checks.equal("GetMetrics", metrics("steady"), [(METRIC, 3, 3.0)])
    checks.equal("GetMetrics with the pool named", metrics("steady", pool="shared"), [(METRIC, 3, 3.0)])
    checks.equal("IsActive", stub.IsActive(of("steady")).result, True)
    steady = Stream(stub.StreamIsActive(of("steady")))
    checks.equal("StreamIsActive says at once what holds", steady.next(), True)

    missing = lambda **more: messages.ScaledObjectRef(name="engines", namespace="inference", scalerMetadata=more)
    for what, call, wanted in [
        ("an unknown deployment", lambda: metrics("nobody"), grpc.StatusCode.NOT_FOUND),
        ("a deployment of another pool", lambda: metrics("steady", pool="other"), grpc.StatusCode.NOT_FOUND),
        ("an unknown metric", lambda: metrics("steady", name="queue"), grpc.StatusCode.INVALID_ARGUMENT),
        ("a trigger that names no deployment", lambda: stub.IsActive(missing()), grpc.StatusCode.INVALID_ARGUMENT),
        ("a stream of an unknown deployment", lambda: list(stub.StreamIsActive(of("nobody"))), grpc.StatusCode.NOT_FOUND),
    ]:
        checks.equal(what, code(call), wanted)

    checks.equal("the kill switch is taken", post(f"{admin}/api/v1/scaling/stop", {"deployment": "steady"})[0], 200)
    stopped = until(lambda: code(lambda: metrics("steady")), grpc.StatusCode.UNAVAILABLE)
    checks.equal("stopped: nothing is known, which is not zero", stopped, grpc.StatusCode.UNAVAILABLE)
    checks.equal("stopped: IsActive", code(lambda: stub.IsActive(of("steady"))), grpc.StatusCode.UNAVAILABLE)
    checks.equal("stopped: GetMetricSpec still answers", code(lambda: stub.GetMetricSpec(of("steady"))), grpc.StatusCode.OK)
    post(f"{admin}/api/v1/scaling/resume", {"deployment": "steady"})
    checks.equal("resumed", until(lambda: code(lambda: metrics("steady")), grpc.StatusCode.OK), grpc.StatusCode.OK)

    checks.equal("a deployment that nobody wants", until(lambda: metrics("asleep"), [(METRIC, 0, 0.0)]), [(METRIC, 0, 0.0)])
    # As KEDA would: there is no replica any more.
    replica.stop()
    asleep = Stream(stub.StreamIsActive(of("asleep")))
    checks.equal("its stream", asleep.next(), False)
    answers = queue.Queue()
    ask = {"model": "asleep", "messages": [{"role": "user", "content": "anybody there?"}]}
    threading.Thread(target=lambda: answers.put(post(f"{farthing.url}/v1/chat/completions", ask, farthing.key)), daemon=True).start()
    checks.equal("a request waits: the stream says so", asleep.next(), True)
    checks.equal("a request waits: IsActive", stub.IsActive(of("asleep")).result, True)
    replica.start()
    try:
        status, answer = answers.get(timeout=PATIENCE_S * 2)
    except queue.Empty:
        status, answer = "no answer", None
    checks.that("the request that waited is answered", status == 200, status if status == 200 else f"{status} {answer}")

    checks.equal("the server stops", farthing.stop(), True)
    checks.that("with open streams", steady.next() in ("end", grpc.StatusCode.UNAVAILABLE), "ended")


def main():
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--ours", type=pathlib.Path, required=True, help="the contract as Farthing was built with it")
    arguments.add_argument("--published", type=pathlib.Path, help="the contract as KEDA publishes it")
    arguments.add_argument("--keep", action="store_true", help="keep the ledger and logs")
    arguments = arguments.parse_args()
    checks, farthing, good = Checks(), None, False
    folder = pathlib.Path(tempfile.mkdtemp(prefix="farthing-keda-"))
    try:
        ours = spoken(compiled(arguments.ours, folder / "ours"))
        generated = folder / "ours"
        if arguments.published:
            published = spoken(compiled(arguments.published, folder / "published"))
            generated = folder / "published"
            differing = {name: (what, published.get(name)) for name, what in ours.items() if published.get(name) != what}
            checks.equal("what the contracts say differently", differing, {})
            more = sorted(set(published) - set(ours))
            print(f"client: the published contract; Farthing leaves out {more or 'nothing'}", file=sys.stderr)
        else:
            print("client: Farthing's own copy of the contract; KEDA_PROTO names the published one", file=sys.stderr)
        checks.equal("methods", sorted(name.split("/")[1] for name in ours if "/" in name), ["GetMetricSpec", "GetMetrics", "IsActive", "StreamIsActive"])
        sys.path.insert(0, str(generated))
        messages, stubs = importlib.import_module("externalscaler_pb2"), importlib.import_module("externalscaler_pb2_grpc")
        keda, steady, asleep = free_port(), free_port(), free_port()
        Replica(steady).start()
        replica = Replica(asleep)
        replica.start()
        farthing = Farthing(folder, "books", config(keda, steady, asleep))
        admin = next(line.split('"')[1] for line in farthing.config.read_text().split("[admin]")[1].splitlines() if line.startswith("listen"))
        drive(checks, farthing, f"http://{admin}", keda, messages, stubs, replica)
        good = checks.report()
    finally:
        if farthing:
            farthing.stop()
        if good and not arguments.keep:
            shutil.rmtree(folder)
        else:
            print(f"ledger and logs: {folder}", file=sys.stderr)
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
