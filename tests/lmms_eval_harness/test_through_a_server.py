"""What lmms-eval sends to a server such as vLLM's when it is called as `docs/benchmarks.md` says."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from local_benchmark import INSTRUCTION, find_videos, write_benchmark


pytest.importorskip("lmms_eval")
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402


@pytest.fixture
def server():
    """Answers every chat with B, and keeps the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            choice = {"index": 0, "message": {"role": "assistant", "content": "B"}, "finish_reason": "stop"}
            usage = {"prompt_tokens": 123, "completion_tokens": 1, "total_tokens": 124}
            body = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", requests
        running.shutdown()


def test_videos_go_as_videos_and_tokens_come_back(server, tmp_path, monkeypatch):
    address, requests = server
    [video] = find_videos(tmp_path, count=1)
    for name, value in {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HLVID_VIDEOS": str(video.parent)}.items():
        monkeypatch.setenv(name, value)
    manager = TaskManager(
        include_path=str(write_benchmark(tmp_path, [video])), include_defaults=False, model_name="openai"
    )
    given = f"model_version=a/b,base_url={address},api_key=EMPTY,timeout=600,num_concurrent=1,pass_video_url=True,max_frames_num=64"
    results = simple_evaluate(
        "openai", given, tasks=["hlvid_local"], batch_size=1, bootstrap_iters=0, task_manager=manager
    )
    assert len(requests) == 2
    for request in requests:
        [message] = request["messages"]
        video_part, question = message["content"]
        assert video_part == {"type": "video_url", "video_url": {"url": f"file://{video}"}}
        assert question["text"].endswith(INSTRUCTION)
        assert request["media_io_kwargs"] == {"video": {"num_frames": 64}} and request["model"] == "a/b"
    costs = [cost for sample in results["samples"]["hlvid_local"] for cost in sample["token_counts"]]
    assert [cost["input_tokens"] for cost in costs] == [123, 123]
