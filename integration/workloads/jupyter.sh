#!/bin/bash
# Jupyter: the notebook server with a kernel (ZeroMQ), over its websocket.
. "$(dirname "$0")/lib.sh"
title="Jupyter"
packages=(jupyter-notebook python3-ipykernel python3-websocket)
did="the notebook server and a kernel; cells that build on each other are run over the websocket"
port=8888

version() { dpkg-query -W -f '${Version}' jupyter-notebook; }

serve() {
    export HOME=/tmp
    cd /tmp
    exec jupyter-notebook --allow-root --no-browser --ip=0.0.0.0 --port=8888 --NotebookApp.token='' --NotebookApp.password='' \
        --NotebookApp.disable_check_xsrf=True
}

client() {
    exec python3 - <<'END'
import json, urllib.request, uuid, websocket
from asking import *

def api(path, body=None):
    return json.load(urllib.request.urlopen(f"http://{ADDRESS}:8888/api/{path}", body, timeout=50))

kernel = api("kernels", b"{}")["id"]
one = websocket.create_connection(f"ws://{ADDRESS}:8888/api/kernels/{kernel}/channels", timeout=50)

def run(code):
    number = uuid.uuid4().hex
    header = {"msg_id": number, "username": "c", "session": "s", "msg_type": "execute_request", "version": "5.3"}
    content = {"code": code, "silent": False, "store_history": False, "allow_stdin": False}
    one.send(json.dumps({"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell"}))
    text = ""
    while True:
        answer = json.loads(one.recv())
        if answer["parent_header"].get("msg_id") != number:
            continue
        if answer["msg_type"] == "stream":
            text += answer["content"]["text"]
        if answer["msg_type"] == "status" and answer["content"]["execution_state"] == "idle":
            return text.strip()

run("x = 0")
count = 0
while not stopped():
    count += 1
    expect(str(count), run("x += 1; print(x)"))
    answered()
END
}

workload "$@"
