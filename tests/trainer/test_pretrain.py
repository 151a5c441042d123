"""Pretraining learns what comes next, the same each time, and its trunk is the one that workers compute
with."""

import itertools
import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from stream.errors import DataError
from stream.model.engine import Engine
from stream.model.layout import Layout
from stream.model.parameters import ParameterSet
from stream.settings import Settings, parse
from stream.wire import EventDecoder, FeedbackRecord, RecordBlock, Schema, encode_event_json
from trainer.checkpoint import Database
from trainer.files import read_feedback_file
from trainer.objectives import Targets, baseline_loss
from trainer.pretrain import fit, load_parameters, pretrain, random_trunk, read_event_file, save_parameters
from trainer.replica import Replica

from . import shop
from .shop import START_MS, block, purchase, send


def alternating(clients: int = 60, events: int = 40) -> list[tuple[str, bytes]]:
    """Clients whose departments alternate, A B A B, an hour and a day apart: the next event is certain."""
    out = []
    for i in range(events):
        for c in range(clients):
            at = START_MS + (i // 2) * 90_000_000 + (i % 2) * 3_600_000
            out.append((f"c{c}", purchase(f"c{c}", at, 1.0 + c % 3, "AB"[(i + c) % 2])))
    return out


def pretraining(**overrides: str) -> Settings:
    return shop.settings(
        **{"PRETRAIN__EPOCHS": "40", "PRETRAIN__BATCH_CLIENTS": "32", "PRETRAIN__LEARNING_RATE": "0.02", **overrides}
    )


def test_the_loss_falls_below_that_of_the_best_constant() -> None:
    # Given events whose successors are certain
    told: list[float] = []
    result = fit(pretraining(), [block(alternating())], lambda share, text: told.append(share))
    # Then the constant can do no better than the entropy of two departments and the variance of the time
    assert result.baseline == pytest.approx(math.log(2) + 1.0, abs=0.1)
    # And the trunk does far better
    assert result.loss < 0.3 * result.baseline
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1.0)


def test_the_same_events_give_the_same_trunk() -> None:
    few = pretraining(PRETRAIN__EPOCHS="2")
    events = alternating(clients=10, events=20)
    # Whatever state the global random generator is in, and however the events are cut into blocks.
    torch.manual_seed(1)
    first = pretrain(few, [block(events)])
    torch.manual_seed(2)
    second = pretrain(few, [block(events[:33]), block(events[33:], first=33)])
    assert first.trunk_id == second.trunk_id
    assert pretrain(pretraining(PRETRAIN__EPOCHS="2", MODEL__SEED="9"), [block(events)]).trunk_id != first.trunk_id


def asked(clients: int = 160, days: int = 4) -> tuple[list[tuple[str, bytes]], list[FeedbackRecord]]:
    """Clients who answer as their first purchase of four says; the others are drawn at random."""
    random = np.random.default_rng(3)
    events, feedback = [], []
    for c in range(clients):
        client, first = f"c{c}", "AB"[c % 2]
        for day in range(days):
            at = START_MS + day * shop.DAY_MS + c
            events.append((client, purchase(client, at, 1.0, first if day == 0 else "AB"[int(random.integers(2))])))
        events.append((client, send(client, at + 1000)))
        feedback.append(FeedbackRecord(client, at + shop.DAY_MS, at + 1000, "redeemed", first == "A"))
    events.sort(key=lambda one: msgspec.msgpack.decode(one[1])["timestamp_ms"])
    return events, feedback


def test_labels_alone_teach_the_trunk_what_decides_them() -> None:
    # Given answers that an early event decides, which says nothing of the next one
    events, feedback = asked()
    alone = pretraining(PRETRAIN__EVENT_WEIGHT="0")
    result = fit(alone, [block(events)], feedback=feedback)
    # Then a constant is as good as a fair coin, and the trunk is far better
    assert result.baseline == pytest.approx(math.log(2), abs=0.1)
    assert result.loss < 0.3 * result.baseline
    # And both losses are there together
    both = fit(pretraining(PRETRAIN__EPOCHS="1"), [block(events)], feedback=feedback)
    without = fit(pretraining(PRETRAIN__EPOCHS="1"), [block(events)])
    assert both.baseline == pytest.approx(without.baseline + math.log(2), abs=0.3)


def test_feedback_that_answers_nothing_is_left_out() -> None:
    # Given an answer of a client, a time, a modality and a task that are not there
    events, _ = asked(clients=12)
    few = pretraining(PRETRAIN__EPOCHS="1")
    client, value = events[0]
    at = msgspec.msgpack.decode(value)["timestamp_ms"]
    others = [("nobody", at, "redeemed"), (client, at + 1, "redeemed"), (client, at, "redeemed"), (client, at, "other")]
    feedback = [FeedbackRecord(who, at + 9, when, task, True) for who, when, task in others]
    # Then the trunk is the one without them
    assert pretrain(few, [block(events)]).trunk_id == fit(few, [block(events)], feedback=feedback).parameters.trunk_id


def test_of_two_answers_the_later_one_counts_and_a_number_is_learned_on_its_own_scale() -> None:
    # Given a task whose label is a number in the thousands, first told wrong
    events, feedback = asked()
    number = parse(
        shop.TOML.replace('on = "send"', 'on = "send"\nkind = "regression"'),
        {"LIVESTATE_PRETRAIN__EPOCHS": "40", "LIVESTATE_PRETRAIN__LEARNING_RATE": "0.02",
         "LIVESTATE_PRETRAIN__BATCH_CLIENTS": "32", "LIVESTATE_PRETRAIN__EVENT_WEIGHT": "0"},
    )  # fmt: skip
    right = [one._replace(label=5000.0 + 1000.0 * one.label) for one in feedback]
    wrong = [one._replace(label=0.0) for one in feedback]
    result = fit(number, [block(events)], feedback=[*wrong, *right])
    # Then its loss is in units of its variance
    assert result.baseline == pytest.approx(1.0, abs=0.1)
    assert result.loss < 0.3


def values(parameters: ParameterSet, field: str) -> list[bytes]:
    data = parameters[f"trunk/values/{field}"].tobytes()
    edges = parameters[f"trunk/value_offsets/{field}"].tolist()
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def test_frequent_values_have_rows_by_count_then_bytes_and_the_rest_is_rare() -> None:
    # Given departments D three times, B and C twice, E once, with a threshold of two
    departments = ["D", "C", "B", "D", "E", "B", "C", "D"]
    events = [("ann", purchase("ann", START_MS + i, department=d)) for i, d in enumerate(departments)]
    events.append(("ann", b"junk"))
    trunk = random_trunk(shop.settings(), [block(events)])
    assert values(trunk, "purchase.department") == [b"D", b"B", b"C"]
    assert trunk["trunk/embedding/purchase.department"].shape == (4, 4)
    assert values(trunk, "send.kind") == []


def test_numbers_are_scaled_by_their_signed_logarithm() -> None:
    amounts = [0.0, -3.0, 10.0, 1e6]
    events = [("ann", purchase("ann", START_MS + i, amount)) for i, amount in enumerate(amounts)]
    squashed = np.copysign(np.log1p(np.abs(amounts)), amounts)
    scale = random_trunk(shop.settings(), [block(events)])["trunk/scale"]
    np.testing.assert_allclose(scale, [[squashed.mean()], [squashed.std()]])
    # A number that never varies, or never occurs, keeps the inputs finite.
    constant = random_trunk(shop.settings(), [block([("ann", purchase("ann", START_MS))])])["trunk/scale"]
    assert constant[1, 0] == 1e-3
    assert random_trunk(shop.settings(), [])["trunk/scale"].tolist() == [[0.0], [1.0]]


def test_what_is_trained_is_what_the_engine_computes(tmp_path: Path) -> None:
    # Given a trained trunk, and events with known, rare and absent values
    one = pretraining(PRETRAIN__EPOCHS="1")
    parameters = pretrain(one, [block(alternating(clients=5))])
    layout = Layout.compile(one, Schema.compile(one))
    departments = ["A", "B", "unheard", "A"]
    events = [("ann", purchase("ann", START_MS + 1000 * i, i, d)) for i, d in enumerate(departments)]
    events.append(("ann", send("ann", START_MS + 9999)))
    # When the engine advances a row over them
    database = Database(tmp_path / "db")
    replica = Replica(database, layout.width, 64, None)
    columns = EventDecoder(layout.schema, one.limits, "msgpack").decode(block(events))
    slots = replica.slots([b"ann"] * len(events), [0] * len(events), {})
    Engine(layout, parameters).advance(columns, slots, replica)
    database.close()

    # Then its hidden state is that of torch's GRU over the inputs as described
    table = parameters["trunk/embedding/purchase.department"]
    known = values(parameters, "purchase.department")
    scale = parameters["trunk/scale"]
    inputs = []
    for i, department in enumerate([*departments, None]):
        at = START_MS + (9999 if department is None else 1000 * i)
        elapsed = 0 if i == 0 else at - (START_MS + 1000 * (i - 1))
        amount = 0.0 if department is None else (math.log1p(i) - scale[0, 0]) / scale[1, 0]
        hour, day = at % 86_400_000 / 86_400_000 * 2 * math.pi, at % 604_800_000 / 604_800_000 * 2 * math.pi
        dense = [
            float(department is not None), float(department is None), amount,
            math.log1p(elapsed / 1000) / 10, float(i == 0),
            math.sin(hour), math.cos(hour), math.sin(day), math.cos(day),
        ]  # fmt: skip
        row = 0 if department is None or department.encode() not in known else 1 + known.index(department.encode())
        embedded = np.zeros(4) if department is None else table[row]
        kind = np.zeros(2) if department is not None else parameters["trunk/embedding/send.kind"][0]
        inputs.append(np.concatenate([dense, embedded, kind]))
    gru = torch.nn.GRU(layout.inputs, layout.hidden, batch_first=True)
    with torch.no_grad():
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            getattr(gru, f"{name}_l0").copy_(torch.tensor(parameters[f"trunk/{name}"]))
        states = gru(torch.tensor(np.array(inputs, np.float32)[None]))[1][0, 0]
    np.testing.assert_allclose(replica.vectors[slots[0], : layout.hidden], states.numpy(), atol=1e-5)


def test_pretraining_without_successors_is_refused() -> None:
    with pytest.raises(DataError, match="two events"):
        pretrain(pretraining(), [block([("ann", purchase("ann", START_MS))])])
    with pytest.raises(DataError, match="two events"):
        pretrain(pretraining(), [])


def test_events_without_a_target_still_teach_the_time() -> None:
    # Given sends alone, which have no department
    events = [(f"c{c}", send(f"c{c}", START_MS + i * 1000)) for i in range(20) for c in range(10)]
    result = fit(pretraining(PRETRAIN__EPOCHS="1"), [block(events)])
    assert math.isfinite(result.loss)


def test_the_baseline_is_the_entropy_of_what_is_valid() -> None:
    codes = torch.tensor([[[0], [1], [-1], [2]]])
    valid = torch.tensor([[True, True, True, False]])
    times = torch.tensor([[1.0, 3.0, 2.0, 99.0]])
    # Two fair values among three positions, and the variance of 1, 3, 2.
    expected = 2 * math.log(2) / 3 + 2 / 3
    assert baseline_loss(Targets(codes, times, valid)) == pytest.approx(expected)


def test_a_parameter_file_brings_back_every_bit(tmp_path: Path) -> None:
    parameters = random_trunk(shop.settings(), [block(alternating(3, 3))])
    path = tmp_path / "new" / "trunk.msgpack"
    save_parameters(path, parameters)
    save_parameters(path, parameters)
    loaded = load_parameters(path)
    assert loaded.trunk_id == parameters.trunk_id
    assert list(loaded) == list(parameters)
    # And nothing is left beside it.
    assert [found.name for found in path.parent.iterdir()] == ["trunk.msgpack"]


@pytest.mark.parametrize("content", [b"", b"junk", b"\x80", b"\x81\xa6format\xa1x"])
def test_a_file_that_is_no_parameter_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "trunk.msgpack"
    path.write_bytes(content)
    with pytest.raises(DataError, match="livestate pretrain"):
        load_parameters(path)
    with pytest.raises(DataError, match="cannot be read"):
        load_parameters(tmp_path / "missing")


def test_an_event_file_is_read_in_blocks_of_records(tmp_path: Path) -> None:
    # Given 5,000 events as JSON lines, with a blank one between
    lines = [
        encode_event_json(f"c{i}", START_MS + i, "send", {"kind": "x"}) + (b"\n\n" if i == 7 else b"\n")
        for i in range(5000)
    ]
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"".join(lines))
    # Then all are accepted, and offsets go on over blocks
    blocks: list[RecordBlock] = list(read_event_file(path, first_offset=10))
    one = shop.settings()
    decoder = EventDecoder(Schema.compile(one), one.limits, "msgpack")
    assert sum(int(decoder.decode(found).accepted.sum()) for found in blocks) == 5000
    assert np.concatenate([found.offsets for found in blocks]).tolist() == list(range(10, 5010))


@pytest.mark.parametrize("line", ["{", "[]", "1", json.dumps({"client": "x"}), json.dumps({"client_id": 7})])
def test_a_line_that_is_no_event_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"client_id": "ann"}\n' + line + "\n")
    with pytest.raises(DataError, match="line 2"):
        list(read_event_file(path))
    with pytest.raises(DataError, match="cannot be read"):
        list(read_event_file(tmp_path / "missing"))


@pytest.mark.parametrize(
    "line", ["[]", '{"client_id": "ann"}', '{"client_id": "ann", "timestamp_ms": 2, "as_of_ms": 3, "task": "x"}']
)
def test_a_line_that_is_no_feedback_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "feedback.jsonl"
    good = {"client_id": "ann", "timestamp_ms": 3, "as_of_ms": 2, "task": "redeemed", "label": True}
    path.write_text(json.dumps(good) + "\n\n" + line + "\n")
    found = read_feedback_file(path, shop.settings())
    assert next(found) == FeedbackRecord("ann", 3, 2, "redeemed", True)
    with pytest.raises(DataError, match="line 3"):
        next(found)
    with pytest.raises(DataError, match="cannot be read"):
        next(read_feedback_file(tmp_path / "missing", shop.settings()))
