"""Completion scripts, and what the command line says of words that it does not know."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from apppot.host import cli
from apppot.host.commands import completion
from apppot.host.commands.table import build_parser
from apppot.host.common.errors import Aborted
from apppot.host.images.record import Record


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_each_shell_gets_a_script_that_offers_images(shell: str) -> None:
    text = completion.script(shell)
    assert "completion --images" in text
    assert "console" in text
    assert "scratch" in text


def test_images_are_offered_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from apppot.host.images import store

    records = [Record("a" * 64, "hmmer", version, "squashfs", 1) for version in ("1", "2")]
    monkeypatch.setattr(store, "list_images", lambda: [("/store", item) for item in records])
    assert cli.dispatch(["completion", "--images"]) == 0
    assert capsys.readouterr().out == "host\nhmmer\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["rnu"], "did you mean run?"),
        (
            ["run", "--tiem", "5", "debian-12"],
            "apppot run: unknown option --tiem (did you mean --t",
        ),
        (["run", "--nework=none", "host", "true"], "did you mean --network?"),
        (["image", "lst"], "did you mean list?"),
        (
            ["image", "list", "--jsn"],
            "apppot image list: unknown option --jsn (did you mean --json",
        ),
        (["image", "list", "more"], "unknown argument more"),
        (["--verson"], "did you mean --version?"),
        (["run"], "IMAGE is missing\n  remedy: name one of: host"),
    ],
)
def test_unknown_words_are_errors_that_suggest(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: object = cli.dispatch(words)
    except SystemExit as stop:
        status = stop.code
    assert status == 125
    assert expected in capsys.readouterr().err


def test_options_after_the_image_belong_to_the_command() -> None:
    parser = build_parser("run")
    args = parser.parse_args(["run", "--mem", "1G", "debian-12", "ls", "--mem", "--unknown"])
    assert args.memory == "1G"
    assert args.argv == ["ls", "--mem", "--unknown"]


def test_help_names_exit_codes_and_environment() -> None:
    text = build_parser("run").format_help()
    assert "environment" in text
    parser = build_parser()
    subparsers = next(a for a in parser._actions if isinstance(a.choices, dict))
    assert isinstance(subparsers.choices, dict)
    run_help = subparsers.choices["run"].format_help()
    for code in ("124", "125", "126", "127", "128+n"):
        assert code in run_help
    for group in ("machine:", "surroundings of the command:", "streams and reports:"):
        assert group in run_help


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [(Aborted(15), 143, ""), (RuntimeError("odd"), 125, "RuntimeError: odd")],
)
def test_no_exception_looks_like_a_status_of_the_payload(
    error: Exception,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(argv: Sequence[str]) -> int:
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.main(["run"], fail)
    assert stop.value.code == status
    assert said in capsys.readouterr().err
