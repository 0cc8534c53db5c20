"""What others make of a compressed folder: pipelines, and the commands of transformers that serve it and talk with it."""

import io
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("transformers")
import transformers
from support.models.chat import END, chat_folder
from support.models.pretrained import FAST

import dbf_compile
from dbf_compile.chat import open_conversation

pytestmark = pytest.mark.slow
CHATS = [[{"role": "user", "content": text}] for text in ("hi", "what comes out?")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dense = chat_folder(tmp_path_factory.mktemp("serving") / "dense")
    return dbf_compile.compress(dense, dense.with_name("compressed"), **FAST, mode="independent").folder


@pytest.fixture(scope="module")
def answers(folder):
    """Return our own answers, of six tokens."""
    conversation = open_conversation(folder, compiled=False, progress=False)
    generator = conversation.generator
    return [
        generator.generate(conversation.prompt(chat[0]["content"]), max_new_tokens=6).text for chat in CHATS
    ]


@pytest.fixture(scope="module")
def pipe(folder):
    pipe = transformers.pipeline("text-generation", str(folder))
    pipe.tokenizer.pad_token, pipe.tokenizer.padding_side = END, "left"
    return pipe


@pytest.mark.parametrize("size", [1, 2])
def test_pipelines_answer_as_we_do(pipe, answers, size):
    results = pipe(CHATS, max_new_tokens=6, do_sample=False, batch_size=size)
    assert [result[0]["generated_text"][-1]["content"] for result in results] == answers


def test_pipelines_continue_texts(pipe, folder):
    texts = ["add the", "signs of a matrix"]
    results = pipe(texts, max_new_tokens=5, do_sample=False, batch_size=2)
    generator = dbf_compile.TextGenerator(folder, compiled=False, progress=False)
    ours = [text + generator.generate(text, max_new_tokens=5).text for text in texts]
    assert [result[0]["generated_text"] for result in results] == ours


def ask(port, path, **body):
    request = urllib.request.Request(
        f"http://localhost:{port}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request if body else request.full_url, timeout=120) as response:
        return response.read().decode()


@pytest.fixture(scope="module")
def port(folder, tmp_path_factory):
    """Serve a folder as users do, in a process that knows of us by the folder alone; return the port."""
    for package in ("fastapi", "uvicorn", "openai", "rich"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = Path(sys.executable).with_name("transformers")
    log = tmp_path_factory.mktemp("serving") / "log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [command, "serve", folder, "--trust-remote-code", "--device", "cpu", "--port", str(port)],
            stdout=output,
            stderr=output,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                ask(port, "/health")
                break
            except OSError:
                time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait(60)


def test_transformers_serve_answers_as_we_do(port, folder, answers):
    for chat, answer in zip(CHATS, answers, strict=True):
        body = {"model": str(folder), "messages": chat, "max_tokens": 6, "temperature": 0}
        whole = json.loads(ask(port, "/v1/chat/completions", **body))["choices"][0]
        assert whole["message"]["content"] == answer and whole["finish_reason"] == "length"
        lines = ask(port, "/v1/chat/completions", **body, stream=True).split("data: ")[1:]
        deltas = [json.loads(line)["choices"][0]["delta"] for line in lines]
        streamed = "".join(delta.get("content") or "" for delta in deltas)
        # Bytes at the end that are no whole character are never streamed: more might follow.
        assert streamed.rstrip("�") == answer.rstrip("�") and answer.startswith(streamed)


def test_transformers_chat_talks_with_it(port, folder, monkeypatch, capsys):
    from transformers.cli.chat import Chat

    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\nn\n!exit\n"))
    flags = ["max_new_tokens=6", "do_sample=False"]
    Chat(str(folder), f"http://localhost:{port}/v1", flags, save_folder=str(folder))
    assert "6 tokens in" in capsys.readouterr().out
