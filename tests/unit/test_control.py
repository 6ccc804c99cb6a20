"""Messages on the control socket: whole on both sides, and nothing else is taken for one."""

from __future__ import annotations

import json

import pytest
from apppot.host.channel import control
from hypothesis import given
from hypothesis import strategies as st

ORDERS = [
    control.Execute(),
    control.Signal(15),
    control.Resize(24, 80),
    control.Stop(0.0),
    control.Stop(2.5),
]
ANSWERS = [
    control.Started(),
    control.Stopped(),
    control.Exited(0),
    control.Exited(143, "the time limit ended the payload"),
    control.Refused("no"),
]


@pytest.mark.parametrize("order", ORDERS)
def test_orders(order: control.Order) -> None:
    assert control.load_order(control.dump(order)) == order


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer: control.Answer) -> None:
    assert control.load_answer(control.dump(answer)) == answer


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "1", "null", '"exec"', "{}", '{"signal": 0}', '{"signal": 65}',
        '{"signal": "9"}', '{"resize": [1]}', '{"resize": [-1, 80]}', '{"resize": [1, 65536]}',
        '{"stop": "now"}', '{"stop": null}', '{"stop": [1]}',
        '{"stop": NaN}', '{"stop": Infinity}', '{"stop": 1%s}' % ("0" * 400), "[" * 4000,
    ],
)  # fmt: skip
def test_what_is_no_order(text: str) -> None:
    with pytest.raises(ValueError):
        control.load_order(text.encode())


@pytest.mark.parametrize("text", ["", "{}", '{"exit": 0}', '{"exit": "0", "complaint": ""}', "7"])
def test_what_is_no_answer(text: str) -> None:
    with pytest.raises(ValueError):
        control.load_answer(text.encode())


def test_time_to_stop_in_is_not_negative() -> None:
    assert control.load_order(b'{"stop": -3}') == control.Stop(0.0)


REQUEST = json.loads(control.ExecRequest((b"ls",), {b"A": b"1"}, tty=True).dump())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("argv", 1), ("argv", [1]), ("argv", None), ("env", [["QQ=="]]), ("env", ["QQ=="]),
        ("cwd", 1), ("user", [1]), ("user", 0), ("user", "4294967296"),
        ("user", "0:99999999999999999999"), ("tty", "no"), ("tty", None), ("read_stdin", 1),
        ("rows", "x"), ("rows", -1), ("rows", 1.5), ("columns", None), ("columns", 1 << 16),
        ("more", 1),
    ],
)  # fmt: skip
def test_what_is_no_request(field: str, value: object) -> None:
    assert control.ExecRequest.load(json.dumps(REQUEST).encode()).tty
    with pytest.raises((ValueError, TypeError)):
        control.ExecRequest.load(json.dumps({**REQUEST, field: value}).encode())


@pytest.mark.parametrize("user", ["", "root", "1000:1000", "4294967294", "-3", "a b", None])
def test_users_that_only_the_guest_knows(user: str | None) -> None:
    request = control.ExecRequest((), {}, user=user)
    assert control.ExecRequest.load(request.dump()) == request


@pytest.mark.parametrize("text", ["", "[]", "1", "{}", "[" * 100_000])
def test_what_is_no_request_at_all(text: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        control.ExecRequest.load(text.encode())


def test_a_long_reason_fits_into_one_message() -> None:
    long = "\U0001f600" * 5000
    for answer in (control.Refused(long), control.Exited(255, long)):
        data = control.dump(answer)
        assert len(data) <= control.MESSAGE_BYTES
        assert type(control.load_answer(data)) is type(answer)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_any_json_is_an_order_or_an_error(value: object) -> None:
    try:
        control.load_order(json.dumps(value).encode())
    except ValueError:
        pass
