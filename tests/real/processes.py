"""The engine and the gateway as processes: started, asked, stopped."""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request

MODEL = "tiny"
# Installing vLLM takes minutes the first time.
ENGINE_PATIENCE_S = 1200


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def fetch(url, patience_s=5):
    with urllib.request.urlopen(url, timeout=patience_s) as answer:
        return answer.read().decode()


class Engine:
    """A real vLLM server, ours or one that runs already (REAL_VLLM_URL)."""

    def __init__(self, folder, model=MODEL, size=None, core=None):
        """Serves `model`; `size` is (layers, hidden) of its weights, the start script's own when absent; `core` is the one
        processor core that it computes on."""
        self.process, self.model = None, model
        self.url = os.environ.get("REAL_VLLM_URL", "").rstrip("/") if model == MODEL else ""
        if self.url:
            return
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = pathlib.Path(folder, f"vllm-{model}.log")
        more = {"REAL_VLLM_LAYERS": str(size[0]), "REAL_VLLM_HIDDEN": str(size[1])} if size else {}
        more |= {"VLLM_CPU_OMP_THREADS_BIND": str(core)} if core is not None else {}
        # Without this flag vLLM keeps the cached part of a prompt to itself on three of four surfaces.
        arguments = os.environ.get("REAL_VLLM_ARGS", "--enable-prompt-tokens-details")
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [os.environ["REAL_VLLM_START"], str(port), model],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                env=os.environ | more | {"REAL_VLLM_ARGS": arguments},
            )

    def wait_until_ready(self):
        until = time.monotonic() + ENGINE_PATIENCE_S
        while time.monotonic() < until:
            if self.process and self.process.poll() is not None:
                raise SystemExit(f"vLLM ended with status {self.process.returncode}; the end of {self.log}:\n{self.log.read_text()[-2000:]}")
            try:
                return json.loads(fetch(self.url + "/v1/models"))
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        raise SystemExit(f"vLLM does not answer at {self.url} after {ENGINE_PATIENCE_S} s")

    def counters(self):
        """The counters that the ledger is held against, once the engine is idle and has published them."""
        last, same = None, 0
        until = time.monotonic() + 120
        while time.monotonic() < until:
            text = fetch(self.url + "/metrics", 30)
            total = lambda name: sum(float(value) for value in re.findall(rf"^vllm:{name}(?:{{[^}}]*}})? (\S+)$", text, re.M))
            now = {name: int(total(name)) for name in ("prompt_tokens_total", "generation_tokens_total", "prompt_tokens_cached_total")}
            busy = total("num_requests_running") + total("num_requests_waiting")
            same = same + 1 if now == last and not busy else 0
            if same >= 4:
                return now
            last = now
            time.sleep(0.3)
        raise SystemExit("vLLM is still busy two minutes after the last request")

    def cpu_seconds(self):
        """Processor time of the process that computes (vLLM names it EngineCore), since it started."""
        ticks, total = os.sysconf("SC_CLK_TCK"), 0
        for folder, fields in self.processes():
            if b"EngineCore" in (folder / "cmdline").read_bytes():
                total += int(fields[11]) + int(fields[12])
        return total / ticks

    def model_folder(self):
        """Where the server's model lies, as its own command line says."""
        for folder, _ in self.processes():
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "--model" in words:
                return pathlib.Path(words[words.index("--model") + 1])
        raise SystemExit(f"the server of {self.model} shows no --model")

    def processes(self):
        """The server's processes: their folders under /proc, and the fields of `stat` after the name (state, parent, group,
        session, …; user and system time are the 12th and 13th)."""
        for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == self.process.pid:
                yield stat.parent, fields

    def stop(self):
        if self.process and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


class Farthing:
    """One instance of the gateway with its own ledger, used as a user would use it."""

    def __init__(self, folder, name, config, on_client_abort="cancel", consumers=("real-test",), gateway=""):
        """`config` is what the file says of upstreams and pools, `gateway` what it says further of the gateway; each consumer gets a key
        and is its own team."""
        self.binary = os.environ["FARTHING_BIN"]
        self.folder = pathlib.Path(folder, name)
        self.folder.mkdir()
        self.port, admin = free_port(), free_port()
        self.url, self.admin = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{admin}"
        self.config, self.data = self.folder / "farthing.toml", self.folder / "data"
        self.config.write_text(f"""
[gateway]
listen = "127.0.0.1:{self.port}"
on_client_abort = "{on_client_abort}"
anonymous = "never"
{gateway}

[admin]
listen = "127.0.0.1:{admin}"
{config}""")
        self.keys = {consumer: self.create_key(consumer) for consumer in consumers}
        self.key = next(iter(self.keys.values()))
        self.log = (self.folder / "serve.log").open("wb")
        self.process = subprocess.Popen(
            [self.binary, "serve", "--config", str(self.config), "--data", str(self.data)],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
        )
        until = time.monotonic() + 30
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise SystemExit(f"farthing does not listen; its log:\n{(self.folder / 'serve.log').read_text()[-2000:]}")
                time.sleep(0.05)

    def create_key(self, consumer):
        created = self.run("key", "create", "--consumer", consumer, "--team", f"{consumer}-team")
        keys = re.findall(r'"(fk-[^"]+)"', json.dumps(created))
        if not keys:
            raise SystemExit(f"`farthing key create` printed no key: {created}")
        return keys[0]

    def run(self, *arguments):
        command = [self.binary, *arguments, "--json", "--config", str(self.config), "--data", str(self.data)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode != 0:
            raise RuntimeError(f"`farthing {' '.join(arguments)}` ended with {done.returncode}: {done.stderr.strip()} {done.stdout.strip()}")
        return json.loads(done.stdout)

    def rows(self, query):
        document = self.run("sql", query)
        lists = [document] if isinstance(document, list) else [value for value in document.values() if isinstance(value, list)]
        return [row for row in lists[0] if isinstance(row, dict)] if lists else []

    def attempts(self, expected):
        """All attempts by request id, once there are as many as expected or it is clear that there never will be."""
        until = time.monotonic() + 30
        while True:
            rows = self.rows(
                "SELECT request_id, operation, streamed, outcome, status, usage_quality, charge, pool, request_model, response_model,"
                " input_tokens, output_tokens, cache_read_tokens FROM attempts"
            )
            if len(rows) >= expected or time.monotonic() > until:
                return rows
            time.sleep(0.3)

    def stop(self):
        if self.process.poll() is None:
            self.process.terminate()
            try:
                return self.process.wait(30) == 0
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return False
