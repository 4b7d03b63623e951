"""A user's own tool that starts and stops engines on this host when a webhook tells it to: POST {"replicas": n} and GET."""

import http.server
import json
import os
import signal
import subprocess
import threading
import time


class Replicas:
    """The first so many of `commands` run; the others do not. What is told is done in the background, the newest order only."""

    def __init__(self, commands):
        """Each command is (arguments, environment, log file)."""
        self.commands, self.processes = commands, [None] * len(commands)
        self.wanted, self.keys, self.running = 0, [], True
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/scale"
        self.threads = [threading.Thread(target=target, daemon=True) for target in (self.server.serve_forever, self.follow)]
        for thread in self.threads:
            thread.start()

    def handler(replicas):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = json.dumps({"replicas": replicas.wanted}).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                self.answer()

            def do_POST(self):
                told = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))))
                replicas.wanted = told["replicas"]
                replicas.keys.append(self.headers.get("idempotency-key"))
                self.answer()

            def log_message(self, *_):
                pass

        return Handler

    def follow(self):
        while self.running:
            for number, (arguments, environment, log) in enumerate(self.commands):
                process = self.processes[number]
                if number < self.wanted and process is None:
                    with open(log, "ab") as log:
                        self.processes[number] = subprocess.Popen(
                            arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=os.environ | environment
                        )
                elif number >= self.wanted and process is not None:
                    self.end(number)
            time.sleep(0.1)

    def end(self, number):
        process, self.processes[number] = self.processes[number], None
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop(self):
        self.running = False
        self.threads[1].join(30)
        self.server.shutdown()
        for number, process in enumerate(self.processes):
            if process:
                self.end(number)
