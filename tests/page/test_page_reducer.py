"""The reducer of the page, and its parts that need no page: the same results as in Python."""

from __future__ import annotations

import random
from typing import Any

import pytest
from playwright.sync_api import Page
from tests.page.conftest import SHELL, Opened
from tests.page.fake_page import FakePage, Json, attachment, guest

from farplug.app.state import apply

REDUCE = """async ([snapshot, events]) => {
  const { apply } = await import(`${location.origin}/static/state.js`);
  const all = [];
  for (const event of events) {
    try { snapshot = apply(snapshot, event); all.push(snapshot); } catch (error) { all.push("raised"); }
  }
  return all;
}"""


@pytest.fixture(scope="module")
def scripts(browsers: Any) -> Any:
    with FakePage() as fake:
        page = browsers(SHELL).new_page()
        page.goto(fake.url)
        yield page
        page.close()


def in_python(snapshot: Json, events: list[Json]) -> list[Any]:
    found: list[Any] = []
    for event in events:
        try:
            snapshot = apply(snapshot, event)
            found.append(snapshot)
        except ValueError:
            found.append("raised")
    return found


def random_event(chance: random.Random, id: int) -> Json:
    name = chance.choice(
        [
            "guest",
            "connected",
            "lost",
            "reconnecting",
            "closed",
            "port",
            "capture-started",
            "capture-ended",
            "guest-removed",
            "attaching",
            "opened",
            "attached",
            "configured",
            "refused",
            "detached",
            "figures",
            "removed",
            "note",
            "medium-ejected",
            "events-dropped",
            "something-new",
        ]
    )
    number = chance.randrange(3)
    port = f"usbredir {number}"
    error = chance.choice([None, {"reason": "filtered", "message": "no"}])
    event: Json = {
        "id": id - chance.choice([0, 0, 0, 0, 5]),
        "time": 1.5,
        "event": name,
        "level": "info",
        "message": name,
        "guest": chance.choice(["g1", "g1", "g1", "g2"]),
        "state": chance.choice(["attached", "in use", "lost"]),
        "attempt": chance.choice([None, {"number": 2, "time": 9.5}]),
        "target": "spice://a",
        "name": "vm",
        "uuid": "u",
        "ports": guest(2)["ports"],
        "number": number,
        "error": error,
        "path": "/x",
        "port": port,
        "device_name": "1d6b:0104",
        "speed": "high",
        "count": 3,
    }
    event |= {figure: chance.randrange(99) for figure in ("read", "written", "commands", "rate", "memory", "errors")}
    if name == "attaching":
        about = attachment("x", port)
        event |= {field: about[field] for field in about if field not in ("id", "state")}
    if name not in ("guest", "connected", "port", "note") or chance.random() < 0.3:
        event |= {"attachment": f"g1.a{chance.randrange(4)}", "device": "a.raw"}
    return event


@pytest.mark.parametrize("seed", range(20))
def test_snapshots_after_events_are_those_of_python(scripts: Page, seed: int) -> None:
    chance = random.Random(seed)
    snapshot = {"last_event": 10, "guests": {"g1": guest(3)}}
    events = [random_event(chance, id) for id in range(11, 91)]
    assert scripts.evaluate(REDUCE, [snapshot, events]) == in_python(snapshot, events)


def call(page: Page, module: str, code: str, *arguments: Any) -> Any:
    load = f"const m = await import(`${{location.origin}}/static/{module}`)"
    return page.evaluate(f"async (given) => {{ {load}; return ({code})(...given); }}", list(arguments))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1500, "1.50 kB"),
        (84_200_000, "84.2 MB"),
        (1e18, "1.00 EB"),
        (5e21, "5\u202f000 EB"),
    ],
)
def test_bytes(scripts: Page, count: float, text: str) -> None:
    assert call(scripts, "figures.js", "m.bytes", count) == text.replace(" ", "\u00a0")


@pytest.mark.parametrize(("seconds", "text"), [(41, "41 s"), (1090, "18 min"), (7560, "2 h 06 min"), (500_000, "5 d")])
def test_durations(scripts: Page, seconds: float, text: str) -> None:
    assert call(scripts, "figures.js", "m.duration", seconds) == text.replace(" ", "\u00a0")


def test_rates_of_the_last_minute(scripts: Page) -> None:
    samples = [{"time": time, "read": time, "written": 0} for time in (100, 150.4, 159.9, 160)]
    found = call(scripts, "state.js", "m.lastMinute", {"samples": samples}, 160)
    assert len(found) == 60
    assert [(place, one["read"]) for place, one in enumerate(found) if one["read"]] == [(49, 150.4), (59, 160)]


def test_a_queue_merges_positions_and_keeps_buttons_keys_and_notches(scripts: Page) -> None:
    sent = call(
        scripts,
        "input_queue.js",
        """async () => {
          const sent = [], open = [];
          const later = (...one) => { sent.push(one); return new Promise((done) => open.push(done)); };
          const queue = new m.InputQueue(later);
          for (let x = 0; x < 4; x++) queue.put("key", { code: `Key${x}`, down: true });
          for (let x = 0; x < 50; x++) queue.put("pointer", { x, y: 0, buttons: [] });
          for (let x = 0; x < 17; x++) queue.put("pointer", { x: 50, y: 0, buttons: [], wheel: 1 });
          queue.put("pointer", { x: 50, y: 0, buttons: ["left"] });
          queue.put("pointer", { x: 51, y: 0, buttons: [] });
          for (let x = 0; x < 9; x++) { open.splice(0).forEach((done) => done()); await null; await null; await null; }
          return sent;
        }""",
    )
    assert sent[4:] == [
        ["pointer", {"x": 50, "y": 0, "buttons": [], "wheel": 15}],
        ["pointer", {"x": 50, "y": 0, "buttons": [], "wheel": 2}],
        ["pointer", {"x": 50, "y": 0, "buttons": ["left"]}],
        ["pointer", {"x": 51, "y": 0, "buttons": []}],
    ]


def test_pixels_are_converted(scripts: Page) -> None:
    code = "() => [...m.toRgba(Uint8Array.from([9, 9, 9, 9, 1, 2, 3, 0, 255, 254, 253, 7]).buffer, 4, 2)]"
    assert call(scripts, "screen.js", code) == [3, 2, 1, 255, 253, 254, 255, 255]


def test_the_drawing_keeps_elements(opened: Opened, fake: FakePage) -> None:
    page = opened(fake)
    found = call(
        page,
        "dom.js",
        """() => {
          const list = document.createElement("ul");
          const draw = (...keys) => m.patch(list, keys.map((key) => m.h("li", { key }, m.h("input", { value: key }))));
          draw("a", "b", "c");
          const before = Object.fromEntries([...list.children].map((one) => [one.firstChild.value, one]));
          draw("c", "new", "a");
          const after = [...list.children].map((one) => one.firstChild.value);
          return [after, list.children[0] === before.c, list.children[2] === before.a];
        }""",
    )
    assert found == [["c", "new", "a"], True, True]


ACTS = """async (events) => {
  const { initial, reduce } = await import(`${location.origin}/static/state.js`);
  let state = reduce(initial, { type: "snapshot", snapshot: { last_event: 0, guests: {} } });
  for (const [name, data] of events) state = reduce(state, { type: "event", name, data, now: 0 });
  return state.log.map((one) => one.message).reverse();
}"""


def test_the_messages_have_what_others_type_and_press(scripts: Page) -> None:
    def act(id: int, client: str, text: str | None = None) -> tuple[str, Json]:
        fields = {} if text is None else {"text": text}
        return "input", {
            "id": id,
            "time": 1,
            "level": "detail",
            "client": client,
            "message": f"{client} acted",
            **fields,
        }

    def driving(name: str, you: bool) -> tuple[str, Json]:
        return "driving", {"holder": {"name": name, "you": you}, "watchers": 1}

    events = [driving("agent", False), act(1, "agent"), act(2, "agent", "ls"), act(3, "mia")]
    events += [driving("mia", True), act(4, "mia"), act(5, "agent", "a\n")]
    shown = scripts.evaluate(ACTS, events)
    assert shown == ["agent acted", "agent acted: ls", "mia acted", "agent acted: a\n"]
