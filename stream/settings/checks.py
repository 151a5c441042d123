"""What settings must be to each other: a memory's field, a task's modality, parts that belong together.

Guaranteed: `check` passes settings whose parts fit, and stops at the first that does not, with its name, its value
and what would be accepted.
"""

from __future__ import annotations

from itertools import pairwise

from stream.errors import SettingsError
from stream.settings.sections import STATE, Field, Kafka, Memory, Settings, Task, Worker

__all__ = ["check"]

#: Most seconds between the shortest time to live of a row and the longest.
_TTL_SPREAD_S = 4 * 365 * 86_400
#: Kinds of memory that keep amounts.
_STATISTICS = ("count", "sum", "visits")
#: Kinds of memory that keep values of a category, declared or not.
_OF_ITEMS = ("ring", "top", "tally", "sketch")
#: Those that heads read only where they are matched with candidates.
_MATCHED = ("ring", "top", "tally")
#: Longest value with a row of its own: a key of the store, less the byte that says what it is of.
_TABLED_BYTES = 1023


def _refuse(name: str, value: object, accepted: object) -> None:
    raise SettingsError(f"{name} = {value!r}: expected {accepted}")


def check(settings: Settings) -> None:
    """Raises SettingsError where a setting does not fit another."""
    _check_kafka(settings.kafka)
    _check_http(settings.worker)
    for modality_name, modality in settings.modalities.items():
        for field_name, field in modality.fields.items():
            _check_field(f"modalities.{modality_name}.fields.{field_name}", field)
    seen: set[str] = set()
    for memory in settings.memory:
        if memory.name in seen:
            _refuse("memory.name", memory.name, "a name that no other memory has")
        seen.add(memory.name)
        _check_memory(settings, memory)
    for task_name, task in settings.tasks.items():
        name = f"tasks.{task_name}"
        if task.on not in settings.modalities:
            _refuse(f"{name}.on", task.on, f"one of the modalities {sorted(settings.modalities)}")
        for field_name in task.inputs:
            asked = settings.modalities[task.on].fields.get(field_name)
            if asked is None or asked.type in ("text", "items") or (asked.type == "category" and not asked.values):
                accepted = f"a number field of {task.on}, or a category field of it with declared `values`"
                _refuse(f"{name}.inputs", field_name, accepted)
        _check_candidates(settings, name, task)
        if task.negative_rate < 1 and task.kind != "binary":
            _refuse(f"{name}.negative_rate", task.negative_rate, f"1 with kind = {task.kind!r}: only binary labels are")
        if task.final_by is not None:
            by = settings.modalities[task.on].fields.get(task.final_by)
            if by is None or by.type != "category" or not by.values:
                _refuse(f"{name}.final_by", task.final_by, f"a category field of {task.on} with declared `values`")
            if task.labels != "final":
                _refuse(f"{name}.final_by", task.final_by, f"nothing with labels = {task.labels!r}")
        _check_standardising(name, task)
        _check_head(name, task)
        _check_leave_out(settings, name, task)
        _check_tables(settings, name, task)
    known = {
        f"{modality_name}.{field_name}"
        for modality_name, modality in settings.modalities.items()
        for field_name, field in modality.fields.items()
        if field.type == "category" and field.embedding
    }
    for target in settings.pretrain.targets:
        if target not in known:
            _refuse("pretrain.targets", target, f"category fields with an embedding: {sorted(known)}")
    _check_trunk(settings)
    _check_ttls(settings)
    if settings.store.max_rows is not None and settings.store.min_rows > settings.store.max_rows:
        _refuse("store.min_rows", settings.store.min_rows, f"at most store.max_rows = {settings.store.max_rows}")


def _check_trunk(settings: Settings) -> None:
    """An online trunk learns through a head that reads the state."""
    model = settings.model
    if model.trunk != "online":
        return
    if model.online.burn_in >= model.online.length:
        _refuse("model.online.burn_in", model.online.burn_in, f"less than model.online.length = {model.online.length}")
    for task in settings.tasks.values():
        for part in task.parts:
            reads = part == "mlp" or (part != "gbdt" and task.state_prior_variance != 0)
            if reads and STATE not in task.leave_out.get(part, ()):
                return
    accepted = (
        "'fixed', or a task whose head is mlp, or logistic or linear with state_prior_variance above 0, that does not "
        "leave out the hidden state"
    )
    _refuse("model.trunk", model.trunk, accepted)


def _check_tables(settings: Settings, name: str, task: Task) -> None:
    fields = settings.modalities[task.on].fields
    for field_name in task.tables:
        field = fields.get(field_name)
        if field is None or field.type != "category" or field.max_bytes > _TABLED_BYTES:
            accepted = f"a category field of {task.on} with max_bytes up to {_TABLED_BYTES}"
            _refuse(f"{name}.tables", field_name, accepted)
    if len(set(task.tables)) != len(task.tables):
        _refuse(f"{name}.tables", task.tables, "every field once")
    if task.tables and {"logistic", "linear"}.isdisjoint(task.parts):
        _refuse(f"{name}.tables", task.tables, "nothing: of the heads, `logistic` and `linear` read tables")


def _check_standardising(name: str, task: Task) -> None:
    sizes = [task.standardise_after, *task.standardise_again]
    if any(later <= earlier for earlier, later in pairwise(sizes)):
        accepted = f"numbers that rise, all above {name}.standardise_after = {task.standardise_after}"
        _refuse(f"{name}.standardise_again", task.standardise_again, accepted)


def _check_head(name: str, task: Task) -> None:
    if task.kind == "multiclass":
        if len(task.classes) < 2 or len(set(task.classes)) != len(task.classes):
            _refuse(f"{name}.classes", task.classes, "two names or more, each once, for kind 'multiclass'")
    elif task.classes:
        _refuse(f"{name}.classes", task.classes, f"nothing: kind {task.kind!r} has no classes")
    fit = ["linear" if task.kind == "regression" else "logistic", "mlp", "gbdt"]
    if len(set(task.parts)) != len(task.parts) or not set(task.parts) <= set(fit):
        _refuse(f"{name}.head", task.head, f"one or several of {', '.join(fit)}, each once, for kind {task.kind!r}")


def _check_leave_out(settings: Settings, name: str, task: Task) -> None:
    """Parts leave out what the head sees, and not everything."""
    matched = {memory for memories in task.candidates.values() for memory in memories}
    seen = {STATE, *task.inputs, *(one.name for one in settings.memory if one.kind not in _MATCHED), *matched}
    for part, left in task.leave_out.items():
        if part not in task.parts:
            _refuse(f"{name}.leave_out", part, f"parts of the head: {', '.join(task.parts)}")
        for one in left:
            if one not in seen:
                _refuse(f"{name}.leave_out.{part}", one, f"what the head sees: {sorted(seen)}")
        if len(set(left)) != len(left) or seen <= set(left):
            _refuse(f"{name}.leave_out.{part}", left, "every name once, and not all that the head sees")


def _check_ttls(settings: Settings) -> None:
    own = {f"modalities.{name}.ttl_s": one.ttl_s for name, one in settings.modalities.items() if one.ttl_s is not None}
    if not own:
        return
    shortest = min([*own.values(), *([] if settings.store.ttl_s is None else [settings.store.ttl_s])])
    for name, ttl_s in {**own, "store.ttl_s": settings.store.ttl_s}.items():
        if ttl_s is not None and ttl_s > shortest + _TTL_SPREAD_S:
            _refuse(
                name, ttl_s, f"at most four years ({_TTL_SPREAD_S} s) above the shortest time to live, {shortest} s"
            )


def _check_kafka(kafka: Kafka) -> None:
    """Each setting of security where it has an effect, and all those that belong together."""
    protocol = kafka.security_protocol
    for part, names in (
        ("SASL", ("sasl_username", "sasl_password_file")),
        ("SSL", ("ssl_ca_file", "ssl_certificate_file", "ssl_key_file", "ssl_key_password_file")),
    ):
        for name in names:
            value = getattr(kafka, name)
            if part not in protocol and value is not None:
                _refuse(f"kafka.{name}", value, f"nothing with kafka.security_protocol = {protocol!r}")
            if value == "" or (part == "SASL" and part in protocol and value is None):
                what = "a name" if name.endswith("username") else "the path of a file"
                _refuse(f"kafka.{name}", value, f"{what} with kafka.security_protocol = {protocol!r}")
    for name, needed in (
        ("ssl_certificate_file", "ssl_key_file"),
        ("ssl_key_file", "ssl_certificate_file"),
        ("ssl_key_password_file", "ssl_key_file"),
    ):
        if getattr(kafka, name) is not None and getattr(kafka, needed) is None:
            _refuse(f"kafka.{needed}", None, f"the path of a file, as kafka.{name} is set")


def _check_http(worker: Worker) -> None:
    certificate, key = worker.http_certificate_file, worker.http_key_file
    if (certificate is None) != (key is None):
        name, other = ("http_key_file", "http_certificate_file")
        if certificate is None:
            name, other = other, name
        _refuse(f"worker.{name}", None, f"the path of a file, as worker.{other} is set")
    if worker.http_advertise is not None and certificate is not None and worker.http_advertise.startswith("http:"):
        _refuse("worker.http_advertise", worker.http_advertise, "an https URL, as worker.http_certificate_file is set")


def _check_candidates(settings: Settings, name: str, task: Task) -> None:
    listing = sorted(key for key, field in settings.modalities[task.on].fields.items() if field.type == "items")
    matched = sorted(memory.name for memory in settings.memory if memory.kind in _MATCHED)
    for field_name, memories in task.candidates.items():
        if field_name not in listing:
            _refuse(f"{name}.candidates", field_name, f"fields of {task.on} of type items: {listing}")
        for memory_name in memories:
            if memory_name not in matched:
                _refuse(f"{name}.candidates.{field_name}", memory_name, f"rings, tops and tallies: {matched}")


def _check_field(name: str, field: Field) -> None:
    if field.type != "number" and (field.min is not None or field.max is not None):
        _refuse(
            f"{name}.min",
            field.min if field.min is not None else field.max,
            "nothing: only numbers have bounds",
        )
    if field.min is not None and field.max is not None and field.min > field.max:
        _refuse(f"{name}.min", field.min, f"at most max = {field.max}")
    if field.type != "category" and (field.embedding or field.values):
        _refuse(f"{name}.embedding", field.embedding, "0: only categories have embeddings and values")
    if len(set(field.values)) != len(field.values):
        _refuse(f"{name}.values", field.values, "every value once")


def _check_memory(settings: Settings, memory: Memory) -> None:
    name = f"memory[{memory.name}]"
    modality = settings.modalities.get(memory.modality)
    if modality is None:
        raise SettingsError(f"{name}.modality = {memory.modality!r}: expected one of {sorted(settings.modalities)}")

    def fields(kind: str) -> list[str]:
        return sorted(key for key, field in modality.fields.items() if field.type == kind)

    needs = "number" if memory.kind == "sum" else "category" if memory.kind in _OF_ITEMS else None
    if needs is not None and memory.field not in fields(needs):
        _refuse(f"{name}.field", memory.field, f"a {needs} field of {memory.modality}: {fields(needs)}")
    if memory.kind == "last":
        kept = modality.fields.get(memory.field or "")
        if kept is None or not (kept.type == "number" or kept.values):
            accepted = f"a number field of {memory.modality}, or a category field of it with declared `values`"
            _refuse(f"{name}.field", memory.field, accepted)
    elif needs is None and memory.field is not None:
        _refuse(f"{name}.field", memory.field, f"nothing: kind {memory.kind!r} reads no field")
    if memory.by is not None:
        by = modality.fields.get(memory.by)
        if by is None or by.type != "category" or not by.values:
            _refuse(f"{name}.by", memory.by, f"a category field of {memory.modality} with declared `values`")
        if memory.kind not in ("count", "sum", "first_time", "last_time"):
            _refuse(f"{name}.by", memory.by, f"nothing: kind {memory.kind!r} keeps no slot per value")
    if memory.half_life_s is not None and (memory.is_time or memory.kind in ("last", "ring")):
        _refuse(f"{name}.half_life_s", memory.half_life_s, f"nothing: kind {memory.kind!r} does not decay")
    if memory.kind != "visits" and memory.gap_s:
        _refuse(f"{name}.gap_s", memory.gap_s, "nothing: only visits have a gap")
    if memory.kind == "sketch" and memory.dimensions > 64:
        _refuse(f"{name}.dimensions", memory.dimensions, "at most 64, a sign for each bit of a hash")
    if memory.per is not None:
        if memory.kind not in _STATISTICS:
            _refuse(f"{name}.per", memory.per, f"nothing: kind {memory.kind!r} is no share of anything")
        wholes = [m.name for m in settings.memory if m.kind in _STATISTICS and m.by is None and m.name != memory.name]
        if memory.per not in wholes:
            _refuse(f"{name}.per", memory.per, f"a count, sum or visits without `by`: {wholes}")
    if memory.kind not in ("last", "ring", "top") and memory.size != 1:
        _refuse(f"{name}.size", memory.size, "nothing: only `last`, `ring` and `top` have a size")
    if memory.where is not None:
        where = memory.where
        given = [key for key in ("above", "below", "equals") if getattr(where, key) is not None]
        if len(given) != 1:
            _refuse(f"{name}.where", given, "exactly one of above, below, equals")
        kind = "category" if given == ["equals"] else "number"
        if where.field not in fields(kind):
            _refuse(f"{name}.where.field", where.field, f"a {kind} field of {memory.modality}: {fields(kind)}")
