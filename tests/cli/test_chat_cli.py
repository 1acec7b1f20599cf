"""`starkv chat`: one shot, the conversation, its commands, and Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from starkv_cli.main import main
from tests.cli.conftest import OnDisk

GREEDY = ["--temperature", "0", "--max-new-tokens", "8"]


def starkv(*args: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(arg) for arg in args])
    return int(end.value.code or 0)


def converse(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_one_shot(on_disk: OnDisk, capsys: pytest.CaptureFixture[str]) -> None:
    assert starkv("chat", on_disk.run, *GREEDY, "--prompt", "Hello", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    stats = found["stats"]
    assert stats["prompt_tokens"] == 5
    assert stats["new_tokens"] == 8
    assert stats["cached_tokens"] == 12
    assert stats["dense_bytes"] == 2 * stats["cache_bytes"]
    assert stats["tokens_per_second"] > 0
    assert starkv("chat", on_disk.run, *GREEDY, "--prompt", "Hello") == 0
    printed = capsys.readouterr()
    assert printed.out == found["answer"] + "\n"
    assert "tokens/s" in printed.err
    assert "(ratio 2.00)" in printed.err


def test_seeds(on_disk: OnDisk, capsys: pytest.CaptureFixture[str]) -> None:
    answers = []
    for seed in (1, 1, 2):
        sampling = ["--temperature", "1.5", "--seed", seed, "--max-new-tokens", 12]
        assert starkv("chat", on_disk.model, *sampling, "--prompt", "Hello") == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_conversation(
    on_disk: OnDisk,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved, as_text = tmp_path / "chat.json", tmp_path / "chat.md"
    converse(
        monkeypatch,
        "/stats",
        "first",
        "",
        "second",
        "/stats",
        f"/save {saved}",
        f"/save {as_text}",
        f"/save {saved}",
        "/save",
        "/nonsense",
        "/help",
        "/reset",
        "/stats",
        "first",
        "/quit",
        "never read",
    )
    assert starkv("chat", on_disk.run, *GREEDY, "--system", "Be brief.") == 0
    printed = capsys.readouterr()
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    # Only answers on stdout; the same question after /reset gets the same greedy answer.
    assert printed.out == "".join(f"{a}\n" for a in [*answers, answers[0]])
    assert "## user\n\nsecond\n" in as_text.read_text()
    for words in (
        "0 exchanges",
        "2 exchanges",
        "prompt tokens reused",
        f"{saved} already exists",
        "name a file",
        "unknown command /nonsense",
        "/save FILE",
        "forgotten",
    ):
        assert words in printed.err, words


def test_end_of_input_leaves(
    on_disk: OnDisk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, "hello")
    assert starkv("chat", on_disk.model, *GREEDY) == 0
    assert len(capsys.readouterr().out) > 1


def test_too_long_a_question_does_not_end_the_conversation(
    on_disk: OnDisk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    converse(monkeypatch, "y" * 1100, "hello")
    assert starkv("chat", on_disk.model, *GREEDY) == 0
    assert "1100 tokens" in capsys.readouterr().err


def test_ctrl_c_stops_one_answer(
    on_disk: OnDisk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import starkv_core.chat as core

    plain = core.stream
    calls = 0

    def interrupted(*args, **options):
        nonlocal calls
        calls += 1
        for count, step in enumerate(plain(*args, **options)):
            if calls == 1 and count == 4:
                signal.raise_signal(signal.SIGINT)
            yield step

    monkeypatch.setattr(core, "stream", interrupted)
    before = signal.getsignal(signal.SIGINT)
    converse(monkeypatch, "first", "second")
    assert starkv("chat", on_disk.run, "--temperature", 0, "--max-new-tokens", 30) == 0
    assert signal.getsignal(signal.SIGINT) is before
    figures = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    assert figures[0].startswith("[5 tokens,")
    assert "stopped" in figures[0]
    assert figures[1].startswith("[30 tokens,")
    assert "reused" in figures[1], "the cache of the stopped answer is whole"


def test_second_ctrl_c_does_not_wait(
    on_disk: OnDisk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import starkv_core.chat as core

    plain = core.stream
    calls = 0

    def hanging(*args, **options):
        nonlocal calls
        calls += 1
        for count, step in enumerate(plain(*args, **options)):
            if calls == 1 and count == 4:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            yield step

    monkeypatch.setattr(core, "stream", hanging)
    converse(monkeypatch, "first", "second")
    assert starkv("chat", on_disk.run, "--temperature", 0, "--max-new-tokens", 30) == 0
    printed = capsys.readouterr()
    assert "stopped" in printed.err
    (figures,) = [line for line in printed.err.splitlines() if "tokens/s" in line]
    assert figures.startswith("[30 tokens,")
    assert "reused" not in figures, "a pass was torn: its cache must not be used again"


SLOW_CHAT = """\
import sys, time
import starkv_core.chat as core
from starkv_cli.main import main

stream = core.stream

def slow(*args, **options):
    for step in stream(*args, **options):
        yield step
        time.sleep(0.1)

core.stream = slow
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_in_a_real_terminal_session(on_disk: OnDisk) -> None:
    """The answer takes a minute and a half: it has not ended when Ctrl-C comes, however late."""
    chat = ["chat", str(on_disk.run), "--temperature", "0", "--max-new-tokens", "900"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_CHAT, *chat],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"tell me everything\n")
        process.stdin.flush()
        process.stdout.read(1)  # the answer has begun
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(b"/quit\n")
    assert process.returncode == 0, err
    assert b"stopped" in err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--json"], ["--json needs --prompt"]),
        (["--prompt", " "], ["--prompt is empty"]),
        (["--temperature", "-1", "--top-p", "2", "--prompt", "x"], ["temperature", "top_p"]),
        (["--max-new-tokens", "0", "--prompt", "x"], ["max_new_tokens"]),
        (["--prompt", "z" * 1024], ["1024 tokens"]),
    ],
)
def test_bad_options(
    on_disk: OnDisk, args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert starkv("chat", on_disk.model, *args) == 2
    printed = capsys.readouterr()
    assert printed.out.strip() == ""
    assert all(word in printed.err for word in words), printed.err
