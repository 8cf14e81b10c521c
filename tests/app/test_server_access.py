"""What visitors can make the server read, by calls that no page sends."""

import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.parse import quote

import pytest


pytest.importorskip("gradio")

CHOICES = [
    "finest",
    "none",
    "Share of the whole clip",
    0.25,
    None,
    4,
    "The selector's own",
    "Whole frames, resized",
    4,
]
MLLM = "LLaVA-OneVision"
SECRET = b"nobody may read this"


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret.mp4"
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def internal():
    """A server of the machine's own network, which notes who asks it for what."""

    class Noting(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(SECRET)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    requested: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), Noting)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()


def get(server, path: str) -> tuple[int, bytes]:
    """Asks for a path as it is, which clients of higher levels would tidy up."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def post(server, path: str, body: object) -> tuple[int, bytes]:
    data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{server.url}{path}", data, headers), timeout=120
        ) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(server, name: str, contents: bytes) -> str:
    """Uploads a file as the page does, and gives its name on the server."""
    body = (
        f'--edge\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    ).encode()
    body += contents + b"\r\n--edge--\r\n"
    headers = {"Content-Type": "multipart/form-data; boundary=edge"}
    request = urllib.request.Request(f"{server.url}/gradio_api/upload", body, headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)[0]


def file_data(path: object, **others: object) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **others}


def prune(server, video: object, visitor: str) -> tuple[int, str]:
    """Calls the page's own function; gives the status, or its last output."""
    config = json.loads(get(server, "/config")[1])
    function = next(known["id"] for known in config["dependencies"] if len(known["inputs"]) > 5)
    call = {"data": [video, *CHOICES, MLLM], "fn_index": function, "session_hash": visitor, "trigger_id": None}
    status, answer = post(server, "/gradio_api/queue/join", call)
    if status != 200:
        return status, answer.decode()
    output = ""
    with urllib.request.urlopen(f"{server.url}/gradio_api/queue/data?session_hash={visitor}", timeout=240) as events:
        for line in events:
            if line.startswith(b"data:"):
                output += line.decode()
                if json.loads(line[5:])["msg"] == "process_completed":
                    return 200, output
    return 200, output


def test_an_upload_can_be_pruned_by_a_call(server, clips):
    path = upload(server, "good.mp4", clips["good"].read_bytes())
    status, output = prune(server, file_data(path), "caller")
    assert status == 200 and "Done in" in output


def test_no_file_of_the_server_can_be_pruned(server, secret):
    names = [
        str(secret),
        f"file://{secret}",
        f"file:{secret}",
        "/etc/passwd",
        f"{server.folder}/../{secret.name}",
        f"{server.folder}/example/../../log.txt",
        os.path.relpath(secret),
        "",
        None,
        7,
    ]
    for name in names:
        for others in ({}, {"url": f"{server.url}/gradio_api/file={secret}"}, {"is_stream": True}):
            status, output = prune(server, file_data(name, **others), "thief")
            assert status == 403 and "uploaded here" in output
    for video in (str(secret), [file_data(str(secret))], {"video": file_data(str(secret))}, {"orig_name": "x"}):
        status, output = prune(server, video, "thief")
        assert SECRET.decode() not in output and "Done in" not in output


def test_no_address_is_fetched(server, internal, clips):
    url, requested = internal
    for name in (
        f"{url}/video.mp4",
        f"{url.upper()}/video.mp4",
        f"//{url[7:]}/video.mp4",
        "http://169.254.169.254/x.mp4",
    ):
        assert prune(server, file_data(name), "fetcher")[0] == 403
        assert prune(server, file_data(None, url=name), "fetcher")[0] == 403
        for route in ("file=", "proxy=", "file/"):
            for address in (name, quote(name, safe="")):
                assert get(server, f"/gradio_api/{route}{address}")[0] in (403, 404)
    # With a good upload, the address beside it is of no matter.
    path = upload(server, "good.mp4", clips["good"].read_bytes())
    assert "Done in" in prune(server, file_data(path, url=f"{url}/video.mp4"), "fetcher")[1]
    assert requested == []


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8"])
def test_uploaded_playlists_are_not_followed(server, internal, secret, name):
    url, requested = internal
    playlist = f"#EXTM3U\n#EXTINF:1,\n{url}/part.ts\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"
    concat = f"ffconcat version 1.0\nfile '{secret}'\n"
    for number, text in enumerate((playlist, concat)):
        path = upload(server, name, text.encode())
        status, output = prune(server, file_data(path), f"lister{number}")
        assert status == 200 and "not a video that FFmpeg can open" in output and SECRET.decode() not in output
        assert str(server.temporary) not in output.split("status", 1)[-1]
    assert requested == []


def test_no_file_of_the_server_is_served(server, secret):
    places = [
        str(secret),
        str(secret).lstrip("/"),
        "/etc/passwd",
        f"{server.folder}/../log.txt",
        f"{server.folder}/../../../../../../etc/passwd",
        f"file://{secret}",
        "../../../../etc/passwd",
        "pyproject.toml",
        str(server.folder),
        f"{server.folder}/results",
    ]
    for place in places:
        for name in (place, quote(place, safe="/"), quote(place, safe=""), place.replace("..", "%2e%2e")):
            for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/static/", "/assets/", "/svelte/"):
                status, answer = get(server, f"{route}{name}")
                assert status in (400, 403, 404, 405, 500), (route, name)
                assert SECRET not in answer and b"root:" not in answer and b"[project]" not in answer


def test_names_of_uploads_stay_in_the_folder(server, clips):
    for name in ("../../escaped.mp4", "/tmp/escaped.mp4", ".hidden.mp4"):
        path = upload(server, name, clips["good"].read_bytes())
        assert os.path.realpath(path) == path and path.startswith(f"{server.folder}/")
        assert len(os.path.relpath(path, server.folder).split("/")) == 2


def test_parts_of_gradio_that_the_page_does_not_need_are_closed(server, clips):
    path = upload(server, "good.mp4", clips["good"].read_bytes())
    for route in (
        "run/predict",
        "api/predict",
        "call/prune",
        "component_server",
        "process_recording",
        "vibe-edit",
        "stream/x",
    ):
        assert post(server, f"/gradio_api/{route}", {"data": [file_data(path)]})[0] == 403
    for route in ("runs", "vibe-code", "dev/reload", "stream/a/b/1/playlist.m3u8", "call/prune/1"):
        assert get(server, f"/gradio_api/{route}")[0] == 403
    assert get(server, "/monitoring/summary")[0] in (403, 404)


def test_calls_and_uploads_that_are_too_large_are_refused_unread(server):
    assert post(server, "/gradio_api/queue/join", {"data": ["x" * 100_000]})[0] == 413
    for headers, status in (({"Content-Length": str(10**9)}, 413), ({"Transfer-Encoding": "chunked"}, 411)):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
        connection.putrequest("POST", "/gradio_api/upload")
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        assert connection.getresponse().status == status


def test_a_visitor_has_one_job_at_a_time(server, clips):
    path = upload(server, "large.mp4", clips["large"].read_bytes())
    config = json.loads(get(server, "/config")[1])
    function = next(known["id"] for known in config["dependencies"] if len(known["inputs"]) > 5)
    choices = [*CHOICES, MLLM]
    choices[5], choices[7] = 16, "Frames as large as they are"
    call = {"data": [file_data(path), *choices], "fn_index": function, "session_hash": "greedy", "trigger_id": None}
    for _ in range(2):
        assert post(server, "/gradio_api/queue/join", call)[0] == 200
    with urllib.request.urlopen(f"{server.url}/gradio_api/queue/data?session_hash=greedy", timeout=240) as events:
        for line in events:
            if b"still being worked on" in line:
                break
        else:
            raise AssertionError("both jobs ran")
