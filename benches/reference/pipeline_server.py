"""One task behind HTTP, as one does without a server that shares models: a transformers pipeline in a process.

usage: pipeline_server.py MODEL PORT

POST / takes {"inputs": [{"text": ..}]} and answers [[{"label": .., "score": ..}, ..], ..]. It listens once it is ready.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import pipeline

# As many processes as tasks share the cores: more threads each would only get in each other's way.
torch.set_num_threads(1)
MODEL, PORT = sys.argv[1], int(sys.argv[2])
classify = pipeline("text-classification", model=MODEL, top_k=None, device="cpu")
turn = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with turn, torch.inference_mode():
            found = classify([each["text"] for each in asked["inputs"]])
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


Server(("127.0.0.1", PORT), Handler).serve_forever()
