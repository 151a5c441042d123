"""The sections of a settings file: what can be told, of which type, within which bounds.

Each setting's `#:` comment is its line in the README. References between settings are checked in
`stream.settings.checks`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

__all__ = [
    "Field",
    "Gbdt",
    "Kafka",
    "Limits",
    "Memory",
    "Mlp",
    "Modality",
    "Model",
    "Pretrain",
    "Settings",
    "Store",
    "Task",
    "Topics",
    "Trainer",
    "Where",
    "Worker",
    "row_ttls",
]

Count = Annotated[int, Meta(ge=1)]
Natural = Annotated[int, Meta(ge=0)]
Seconds = Annotated[float, Meta(gt=0)]
Port = Annotated[int, Meta(ge=0, le=65535)]
Name = Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,62}$")]
#: What the hidden state is called among what heads see.
STATE = "hidden"
HeadName = Literal["logistic", "linear", "mlp", "gbdt"]
TopicName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,249}$")]


class _Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A table of the settings file; unknown names in it are refused."""


class Kafka(_Section, frozen=True):
    """How to reach the broker."""

    #: Brokers to ask first: `host:port`, several joined by commas.
    bootstrap_servers: str = "127.0.0.1:9092"
    #: One consumer group for the workers and one for the trainer are named after it.
    group: TopicName = "livestate"
    #: A worker that is silent for so long loses its partitions.
    session_timeout_s: Annotated[float, Meta(ge=1, le=300)] = 15.0
    #: Whether the group knows a worker by its `worker.data_dir`, so that one that died and is started again has its
    #: partitions back at once rather than after `session_timeout_s`.
    static_membership: bool = True
    #: Whether connections are encrypted (`SSL`), and whether the broker asks for a password (`SASL`).
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    #: SASL: how the password is shown. `PLAIN` sends it as it is, which anybody on the way can read without `SASL_SSL`.
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] = "SCRAM-SHA-512"
    #: SASL: who this is.
    sasl_username: str | None = None
    #: SASL: a file of one line, the password.
    sasl_password_file: str | None = None
    #: SSL: certificates of the authorities that may vouch for a broker, PEM; by default the system's.
    ssl_ca_file: str | None = None
    #: SSL: this client's certificate, PEM, where the broker asks for one.
    ssl_certificate_file: str | None = None
    #: SSL: its private key, PEM.
    ssl_key_file: str | None = None
    #: SSL: a file of one line, the key's password, if it has one.
    ssl_key_password_file: str | None = None
    #: Codec of what workers and trainer write.
    compression: Literal["none", "gzip", "snappy", "lz4", "zstd"] = "lz4"


class Topics(_Section, frozen=True):
    """Names and shape of the topics. The first four share the number of partitions and the partitioner."""

    #: Written by publishers.
    events: TopicName = "events"
    #: Written by publishers.
    feedback: TopicName = "feedback"
    #: Written by workers, compacted.
    embeddings: TopicName = "embeddings"
    #: Written by workers, compacted; what a lost worker is restored from.
    changelog: TopicName = "changelog"
    #: Written by the trainer, compacted; one partition.
    parameters: TopicName = "parameters"
    #: What was refused, and why; one partition.
    dead_letters: TopicName = "dead-letters"
    #: Of events, feedback, embeddings and changelog. Cannot be changed later.
    partitions: Annotated[int, Meta(ge=1, le=10_000)] = 4
    #: Copies of each topic, where Livestate creates it.
    replication: Count = 1
    #: How a record without a `content-type` header is read.
    format: Literal["msgpack", "json"] = "msgpack"
    #: How embeddings are written. JSON is for consumers that cannot read MessagePack; it costs more.
    embeddings_format: Literal["msgpack", "json"] = "msgpack"


class Limits(_Section, frozen=True):
    """Bounds on what publishers may send."""

    #: Largest event or feedback record.
    record_bytes: Annotated[int, Meta(ge=64, le=64 * 1024 * 1024)] = 1_048_576
    #: Longest client id, in UTF-8.
    client_id_bytes: Annotated[int, Meta(ge=1, le=1024)] = 256
    #: An event may lie this far after its record's own Kafka timestamp. Measured against the record and not the
    #: clock on the wall, so that a replay accepts exactly what the first pass accepted.
    max_skew_s: Seconds = 3600.0


class Field(_Section, frozen=True):
    """One field of a modality's events.

    `category`: text, an integer or a boolean, compared as text. `number`: finite, within `min` and `max`.
    `text`: validated and kept out of the model. `items`: a list of categories, or of lists of them, which are groups;
    a category beside groups is a group by itself. A task names such a field as its `candidates`.
    """

    #: What the field holds.
    type: Literal["category", "number", "text", "items"]
    #: Whether an event without it is refused.
    required: bool = True
    #: category, text, items: longest value, in UTF-8.
    max_bytes: Annotated[int, Meta(ge=1, le=65_536)] = 64
    #: number: smallest value.
    min: float | None = None
    #: number: largest value.
    max: float | None = None
    #: category: width of its learned embedding in the encoder; 0 leaves it out.
    embedding: Annotated[int, Meta(ge=0, le=256)] = 0
    #: category: a value gets a row of its own in the trunk from this many occurrences in the pretraining data.
    min_count: Count = 20
    #: category: the closed list of values that `by` memories keep a slot for (any other value uses the last slot).
    values: list[str] = []
    #: number: whether the encoder reads it, after a signed logarithm and scaling.
    encode: bool = True
    #: items: most categories in the list, over all its groups.
    max_items: Annotated[int, Meta(ge=1, le=65_536)] = 1024


class Modality(_Section, frozen=True):
    """One kind of event."""

    fields: dict[Name, Field] = {}
    #: An event of this kind keeps its client for so long, in event time; by default for `store.ttl_s`. A client is
    #: forgotten once the time of every event of its own is over. At most four years longer than the shortest.
    ttl_s: Annotated[float, Meta(gt=0, le=1e11)] | None = None


class Where(_Section, frozen=True):
    """A condition on one field of the event: exactly one of `above`, `below`, `equals`."""

    #: A number field for `above` and `below`, a category field for `equals`.
    field: Name
    #: The number is larger.
    above: float | None = None
    #: The number is smaller.
    below: float | None = None
    #: The category is this value.
    equals: str | None = None


class Memory(_Section, frozen=True):
    """One statistic that every row keeps about its client, updated with each event of `modality`.

    kind `count`: events; `sum`: a number field; `visits`: events that come more than `gap_s` after the previous
    one of the modality; `first_time`, `last_time`: when it first or last happened; `last`: the latest `size` values
    of a number field, or of a category field with declared `values`; `ring`: the latest `size` values of any
    category field, as 48 bits of their hash; `top`: up to `size` values of any category field, so too, each with its
    count (a value that is not among them takes the place of the one with the smallest count, and begins anew);
    `tally`: counts of all values of any category field, in twice `dimensions` bins (a count-min sketch: Cormode and
    Muthukrishnan, 2005); `sketch`: sum of fixed random sign codes of a category field, `dimensions` wide. `half_life_s`
    makes count, sum, visits, top, tally and sketch decay; `by` keeps one slot for every declared value of a category
    field and one for all others. Latest by arrival: of two events the one with the larger offset, also where it is
    late. Rings, tops and tallies are read where a task has `candidates`.
    """

    #: Names its features.
    name: Name
    #: The kind of event that updates it.
    modality: Name
    #: What is kept; see above.
    kind: Literal["count", "sum", "visits", "first_time", "last_time", "last", "ring", "top", "tally", "sketch"]
    #: sum: the number added; last: the number or category kept; ring, top, tally, sketch: the category.
    field: Name | None = None
    #: count, sum, first_time, last_time: one slot for each declared value of this category field, and one for all
    #: others.
    by: Name | None = None
    #: It decays to a half in this event time; without it, it does not decay.
    half_life_s: Seconds | None = None
    #: Only events for which this holds.
    where: Where | None = None
    #: visits: events that come no later than this after the one before belong to the same visit.
    gap_s: Annotated[float, Meta(ge=0)] = 0.0
    #: sketch: its width, at most 64; tally: half its width.
    dimensions: Annotated[int, Meta(ge=1, le=1024)] = 32
    #: count, sum, visits: heads read it as a share of this other memory, which keeps one value; by itself by default.
    per: Name | None = None
    #: last, ring, top: how many values are kept.
    size: Annotated[int, Meta(ge=1, le=256)] = 1

    @property
    def is_time(self) -> bool:
        """Whether it keeps times, two floats each."""
        return self.kind in ("first_time", "last_time")


class Online(_Section, frozen=True):
    """How a trunk learns all the time: truncated backpropagation from stored states."""

    #: Latest events of each client that the trainer keeps, with the state before them. A label teaches the trunk while
    #: the event that it answers is among them, so it should be more than a client's events in the usual delay.
    length: Annotated[int, Meta(ge=1, le=4096)] = 64
    #: The first of them only bring the stored state to the trunk as it is now; nothing is learned through them. Not
    #: where a client's whole history is kept.
    burn_in: Natural = 8
    #: Labels in a step; fewer wait.
    labels: Annotated[int, Meta(ge=1, le=4096)] = 64
    #: Of AdamW, once warm.
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 0.001
    #: Steps over which the learning rate rises to its full height.
    warm_up: Natural = 100
    #: The gradient is scaled down to this norm.
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0


class Model(_Section, frozen=True):
    """The trunk: encoder and recurrent cell."""

    #: Width of the recurrent state.
    hidden: Annotated[int, Meta(ge=8, le=2048)] = 64
    #: Of every random choice in training.
    seed: Natural = 0
    #: What the embeddings topic and HTTP serve: the hidden state, or the hidden state and the memory's readout.
    vector: Literal["hidden", "features"] = "hidden"
    #: `fixed`: it stays as it was pretrained until `livestate rebuild` brings another one, and states are exactly those
    #: of one pass. `online`: the trainer goes on learning it from labels, and workers take it over without a rebuild;
    #: states are then close to those of one pass, and no longer equal. The same for trainer and workers.
    trunk: Literal["fixed", "online"] = "fixed"
    online: Online = Online()


class Mlp(_Section, frozen=True):
    """The head `mlp`: networks with one hidden layer each, learned a step at a time, with replay."""

    #: Networks, whose scores are averaged.
    members: Annotated[int, Meta(ge=1, le=64)] = 4
    #: Hidden units of each one.
    hidden: Annotated[int, Meta(ge=1, le=1024)] = 64
    #: Each number among the inputs is read once more in so many pieces, from two standard deviations below the usual to
    #: two above, so that what it says may rise, fall or turn anywhere; 0 for none. Worth its price where much depends
    #: on counts and times: so many columns more for each of them.
    pieces: Annotated[int, Meta(ge=0, le=64)] = 0
    #: Share of the inputs left out of a step.
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.4
    #: Share of the hidden units left out of a step.
    hidden_dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.3
    #: Of AdamW, once warm.
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 0.001
    #: Of AdamW.
    weight_decay: Annotated[float, Meta(ge=0, le=1)] = 0.01
    #: New labels in a step; fewer wait.
    new_examples: Annotated[int, Meta(ge=1, le=4096)] = 8
    #: Earlier examples in a step, drawn from `keep_examples`, for each new one.
    replay: Annotated[int, Meta(ge=0, le=256)] = 7
    #: What is served is an exponential average over steps; this much of it stays at each one.
    average: Annotated[float, Meta(ge=0, lt=1)] = 0.99
    #: Steps over which the learning rate rises to its full height.
    warm_up: Natural = 100
    #: The gradient is scaled down to this norm.
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0


class Gbdt(_Section, frozen=True):
    """The head `gbdt`: boosted trees by LightGBM on the examples as they were at prediction time."""

    #: Stream time between two fits.
    refit_interval_s: Seconds = 7 * 86400.0
    #: A fit, made beside everything else, serves after this much stream time, whenever it was done.
    delay_s: Annotated[float, Meta(ge=0)] = 600.0
    #: No fit with fewer labels, or (classes) with fewer of any class than a hundredth of this.
    least_examples: Annotated[int, Meta(ge=2)] = 1000
    #: Trees.
    trees: Annotated[int, Meta(ge=1, le=10_000)] = 250
    #: Shrinkage of each tree.
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 0.03
    #: Leaves of a tree.
    leaves: Annotated[int, Meta(ge=2, le=4096)] = 15
    #: Least examples in a leaf.
    leaf_examples: Count = 200
    #: Share of the examples each tree sees.
    subsample: Annotated[float, Meta(gt=0, le=1)] = 0.5
    #: Share of the inputs each tree sees.
    columns: Annotated[float, Meta(gt=0, le=1)] = 0.3
    #: L2 penalty on leaf values.
    penalty: Annotated[float, Meta(ge=0)] = 10.0
    #: Most bins of an input.
    bins: Annotated[int, Meta(ge=2, le=255)] = 63


class Task(_Section, frozen=True):
    """One thing to predict. A prediction is made at every event of modality `on`."""

    #: The modality whose events ask for a prediction.
    on: Name
    #: What a label is: true or false; one of `classes`; a number.
    kind: Literal["binary", "multiclass", "regression"] = "binary"
    #: multiclass: the names of the classes; each one's probability is served as `TASK.CLASS`.
    classes: list[Annotated[str, Meta(min_length=1, max_length=64)]] = []
    #: What predicts; of several, the average (of log-odds, or of values). `logistic`: Bayesian, one exact update for
    #: all labels that are final at one moment, for up to thousands of them (of several classes, each against the
    #: others); `linear`: the same for a regression; `mlp`: a small ensemble of networks with replay and averaged
    #: weights, for many labels; `gbdt`: LightGBM, refitted on schedule. By default `logistic`, and `linear` for a
    #: regression.
    head: HeadName | Annotated[list[HeadName], Meta(min_length=1)] | None = None
    #: When a label is learned, since positives known early are a biased sample: once its feedback's window has
    #: `closed`; once it is `final`, which is then or when the prediction is so old that more than `final_share` of the
    #: positives have usually come (without one it is learned as negative, and a positive that comes after all is
    #: learned as well); or `as_they_come`. Feedback without a window is learned at once. Other than binary labels are
    #: final when their window closes.
    labels: Literal["final", "closed", "as_they_come"] = "final"
    #: Labels `final`: share of the positives, as delays in windows that have closed tell it.
    final_share: Annotated[float, Meta(gt=0, lt=1)] = 0.85
    #: Labels `final`: a category field of `on` with declared `values`; delays are learned for each value (and for all
    #: others), drawn towards what is common to all. Windows of one value should be of similar length.
    final_by: Name | None = None
    #: binary: share of the negatives that are learned from, drawn by client and time. What is predicted stays
    #: calibrated, as log-odds are corrected for it.
    negative_rate: Annotated[float, Meta(gt=0, le=1)] = 1.0
    #: Prior variance of each weight of the Bayesian logistic head (inputs are standardised).
    prior_variance: Annotated[float, Meta(gt=0, le=100)] = 0.01
    #: The same for weights on hidden state and sketches, whose many columns say little each; by default a tenth. At 0
    #: they have no say.
    state_prior_variance: Annotated[float, Meta(ge=0, le=100)] | None = None
    #: The same for the bias.
    bias_variance: Annotated[float, Meta(gt=0, le=1000)] = 4.0
    #: Standardise inputs by this many first examples, labelled or not; nothing is learned before.
    standardise_after: Annotated[int, Meta(ge=2)] = 500
    #: Standardise anew by all examples so far when there are so many, the numbers rising; until the last of them every
    #: label is kept, and at each the head learns all labels again, which takes as long as learning them did.
    standardise_again: list[Annotated[int, Meta(ge=3)]] = []
    #: Fields of `on` that the head sees: numbers, and categories with declared `values` (one input each).
    inputs: list[Name] = []
    #: What parts of the head do not see, each part by its name: names of memories, of `inputs`, and `hidden` for the
    #: hidden state. A part learns and predicts as if there were nothing of that.
    leave_out: dict[str, list[Name]] = {}
    #: Fields of `on` of type `items` that list candidates, each with the rings, tops and tallies matched with them.
    candidates: dict[Name, list[Name]] = {}
    #: logistic, linear: category fields of `on` whose every value has a learned weight of its own, with a variance of
    #: its own, updated with each label.
    tables: list[Name] = []
    #: A value gets a weight of its own at this occurrence; until then it shares one with all such values.
    table_admission: Count = 5
    #: A value that has not occurred for so long, in event time, is forgotten.
    table_ttl_s: Seconds | None = 365 * 86400.0
    #: Most values with a weight of their own, for each field; the least recent go first.
    table_max_rows: Annotated[int, Meta(ge=64)] = 1_000_000
    #: Prior variance of each of these weights.
    table_prior_variance: Annotated[float, Meta(gt=0, le=100)] = 0.1
    #: Examples whose feedback has not come are forgotten after this long, in event time.
    feedback_ttl_s: Seconds = 180 * 86400.0
    #: mlp, gbdt: answered examples kept in memory and on disk to learn from again, the newest ones; each takes 4 bytes
    #: for each input.
    keep_examples: Annotated[int, Meta(ge=256, le=10_000_000)] = 100_000
    mlp: Mlp = Mlp()
    gbdt: Gbdt = Gbdt()

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of the head, in the order given."""
        if self.head is None:
            return ("linear",) if self.kind == "regression" else ("logistic",)
        return (self.head,) if isinstance(self.head, str) else tuple(self.head)


class Store(_Section, frozen=True):
    """The embedding store of each partition."""

    #: Rows of all partitions kept in memory; the others are read back from disk.
    memory_rows: Annotated[int, Meta(ge=64)] = 1_000_000
    #: Most copies, in a scratch file beside each partition's database, of rows that left memory, which makes reading
    #: them back fast; by default ten for each row of `memory_rows` while a tenth of the file system is free.
    cold_rows: Natural | None = None
    #: A client without events for so long, in event time, is forgotten; without it never. A modality may have a
    #: `ttl_s` of its own.
    ttl_s: Seconds | None = None
    #: Most rows of a partition; the least recently updated go first.
    max_rows: Annotated[int, Meta(ge=64)] | None = None
    #: A client gets a row at this event of its own; the ones before are held, and applied then.
    admission_threshold: Count = 1
    #: Most bytes of events held for one client that has no row yet; the oldest are dropped beyond.
    held_bytes: Annotated[int, Meta(ge=1, le=64 * 1024 * 1024)] = 262_144
    #: Expiry leaves at least so many rows of a partition.
    min_rows: Natural = 0


class Worker(_Section, frozen=True):
    """The serving worker."""

    #: Where the partitions' databases lie; each worker has its own.
    data_dir: str = "data/worker"
    #: Time between checkpoints; a restart replays at most so much.
    checkpoint_interval_s: Seconds = 10.0
    #: Most records of a partition processed at once.
    batch_records: Annotated[int, Meta(ge=1, le=65_536)] = 32_768
    #: Address that HTTP listens on.
    http_host: str = "127.0.0.1"
    #: Its port; 0 takes any free one.
    http_port: Port = 6066
    #: Base URL at which the other workers reach it, such as `http://worker-1:6066`; by default made of the host, or of
    #: this machine's name where the host is every address, and the port.
    http_advertise: Annotated[str, Meta(pattern=r"^https?://[^/?#\s]+/?$")] | None = None
    #: What a worker does with a question for one client of another worker: ask it (`proxy`) or name it (`redirect`).
    http_routing: Literal["proxy", "redirect"] = "proxy"
    #: How long a question waits for a client whose partition changes hands.
    http_timeout_s: Seconds = 5.0
    #: A file of one line, the bearer token that questions under `/v1` have to carry; the same for all workers.
    http_token_file: str | None = None
    #: The server's certificate, PEM: HTTP speaks TLS. It has to hold for the address at which others reach the worker.
    http_certificate_file: str | None = None
    #: Its private key, PEM, without a password.
    http_key_file: str | None = None
    #: Certificates of the authorities that may vouch for other workers, PEM; by default the system's.
    http_ca_file: str | None = None
    #: How long to wait for confirmations, and for the group, when it is told to stop.
    stop_timeout_s: Seconds = 30.0


class Trainer(_Section, frozen=True):
    """The online trainer."""

    #: Where its database lies.
    data_dir: str = "data/trainer"
    #: Time between checkpoints.
    checkpoint_interval_s: Seconds = 10.0
    #: Time between parameter versions, where something was learned; after a rest two may follow each other.
    publish_interval_s: Seconds = 0.5
    #: Most versions kept for `livestate rollback`; of older ones, fewer and fewer for the same time.
    history_versions: Annotated[int, Meta(ge=2, le=1000)] = 32
    #: A version is kept when the one kept before is at least so old.
    history_interval_s: Annotated[float, Meta(ge=0)] = 10.0
    #: The trainer is behind when a record that waits for it is older than this, by Kafka's timestamp. It says so.
    behind_s: Seconds = 30.0
    #: What it does then: `wait`, which is to go on with everything in its order, or `sample`: learn from
    #: `sample_share` of the labels until it is no longer behind. Rows are exact either way.
    when_behind: Literal["wait", "sample"] = "wait"
    #: The share of labels that is learned from then; each weighs as many as it stands for.
    sample_share: Annotated[float, Meta(gt=0, le=1)] = 0.1
    #: Time between versions with tensors (heads' weights), two of which may follow each other after a rest; those in
    #: between have rows of tables only.
    dense_interval_s: Seconds = 0.5
    #: Whether what a task learned is held back, and given up, where it proves worse than a good state from before.
    guard: bool = True
    #: The good state is that of so many labels ago, at most twice as many. Wrong labels in a row that are more are
    #: taken for a changed world.
    guard_labels: Annotated[int, Meta(ge=64)] = 5_000
    #: Share of the good state's loss by which the present one may be worse.
    guard_tolerance: Annotated[float, Meta(ge=0, le=10)] = 0.05
    #: What is not worse is held back once in so many labels at most, in the mean.
    guard_false_alarm_labels: Annotated[float, Meta(ge=1_000, le=1e100)] = 1e8
    #: Address that HTTP listens on.
    http_host: str = "127.0.0.1"
    #: Its port; 0 takes any free one.
    http_port: Port = 6067


class Pretrain(_Section, frozen=True):
    """How the trunk is pretrained: on the next event, from the events before it, and on labels where there are any."""

    #: Passes over the sequences.
    epochs: Count = 1
    #: Of AdamW.
    learning_rate: Annotated[float, Meta(gt=0, le=1)] = 0.002
    #: Sequences in a step.
    batch_clients: Count = 128
    #: Events in a sequence.
    sequence: Annotated[int, Meta(ge=8, le=4096)] = 64
    #: Most sequences, drawn at random.
    max_sequences: Count = 6000
    #: Category fields predicted for the next event, besides the time until it: `modality.field`.
    targets: list[str] = []
    #: What the loss of the next event weighs.
    event_weight: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    #: What the loss of the labels weighs that `livestate pretrain --feedback` gives.
    label_weight: Annotated[float, Meta(ge=0, le=1000)] = 1.0


class Settings(_Section, frozen=True):
    """Everything Livestate can be told."""

    modalities: Annotated[dict[Name, Modality], Meta(min_length=1, max_length=64)]
    memory: list[Memory] = []
    tasks: dict[Name, Task] = {}
    kafka: Kafka = Kafka()
    topics: Topics = Topics()
    limits: Limits = Limits()
    model: Model = Model()
    store: Store = Store()
    worker: Worker = Worker()
    trainer: Trainer = Trainer()
    pretrain: Pretrain = Pretrain()


def row_ttls(settings: Settings) -> tuple[int | None, tuple[int | None, ...]]:
    """How long rows live, and, where that is not the same for all modalities, what an event of each one gives a row.

    In milliseconds of event time, None for ever; modalities in the order of the settings.
    """
    own = [settings.store.ttl_s if one.ttl_s is None else one.ttl_s for one in settings.modalities.values()]
    ttl_ms, *event_ttls_ms = [None if ttl is None else int(ttl * 1000) for ttl in (settings.store.ttl_s, *own)]
    if len(set(event_ttls_ms)) == 1:
        return event_ttls_ms[0], ()
    return ttl_ms, tuple(event_ttls_ms)
