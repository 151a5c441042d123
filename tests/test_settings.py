"""Wrong settings are refused with the setting's name, its value and what would be accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from stream.errors import SettingsError
from stream.settings import load, parse, row_ttls
from tests.support.settings import SETTINGS

EXAMPLES = Path(__file__).parents[1] / "stream" / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda p: p.name)
def test_the_shipped_examples_are_accepted(path: Path) -> None:
    assert load(path, {}).modalities


@pytest.mark.parametrize(
    ("extra", "name", "value", "accepted"),
    [
        ("[worker]\nhttp_port = 99999", "worker.http_port", "99999", "<= 65535"),
        ('[worker]\nhttp_port = "x"', "worker.http_port", "'x'", "`int`"),
        ("[worker]\ncheckpoint_interval_s = 0.0", "worker.checkpoint_interval_s", "0.0", "> 0"),
        ("[worker]\nhttp_prt = 1", "worker", "http_prt", "accepted: batch_records"),
        ('[topics]\nevents = "with space"', "topics.events", "'with space'", "matching regex"),
        (
            '[kafka]\nsecurity_protocol = "TLS"',
            "kafka.security_protocol",
            "'TLS'",
            "expected one of PLAINTEXT, SSL, SASL_",
        ),
        ('[kafka]\nsasl_username = "a"', "kafka.sasl_username", "'a'", "kafka.security_protocol = 'PLAINTEXT'"),
        ('[kafka]\nssl_ca_file = "a"', "kafka.ssl_ca_file", "'a'", "kafka.security_protocol = 'PLAINTEXT'"),
        (
            '[kafka]\nsecurity_protocol = "SASL_SSL"\nsasl_username = "a"',
            "kafka.sasl_password_file",
            "None",
            "the path of a file",
        ),
        (
            '[kafka]\nsecurity_protocol = "SASL_SSL"\nsasl_password_file = "a"',
            "kafka.sasl_username",
            "None",
            "a name with kafka.security_protocol = 'SASL_SSL'",
        ),
        (
            '[kafka]\nsecurity_protocol = "SSL"\nssl_certificate_file = "a"',
            "kafka.ssl_key_file",
            "None",
            "as kafka.ssl_certificate_file is set",
        ),
        ('[worker]\nhttp_key_file = "a"', "worker.http_certificate_file", "None", "as worker.http_key_file is set"),
        ('[worker]\nhttp_certificate_file = "a"', "worker.http_key_file", "None", "the path of a file"),
        ('[worker]\nhttp_advertise = "worker-1:6066"', "worker.http_advertise", "'worker-1:6066'", "matching regex"),
        (
            '[worker]\nhttp_advertise = "http://a"\nhttp_certificate_file = "a"\nhttp_key_file = "b"',
            "worker.http_advertise",
            "'http://a'",
            "an https URL",
        ),
        ('[worker]\nhttp_routing = "ask"', "worker.http_routing", "'ask'", "expected one of proxy, redirect"),
        ("[store]\nmin_rows = 100\nmax_rows = 64", "store.min_rows", "100", "at most store.max_rows = 64"),
        ('[tasks.x]\non = "visit"', "tasks.x.on", "'visit'", "['offer', 'pay']"),
        ('[tasks.x]\non = "pay"\nkind = "multiclass"', "tasks.x.classes", "[]", "two names or more, each once"),
        ('[tasks.x]\non = "pay"\nclasses = ["a", "b"]', "tasks.x.classes", "['a', 'b']", "nothing: kind 'binary'"),
        ('[tasks.x]\non = "pay"\nhead = "linear"', "tasks.x.head", "'linear'", "one or several of logistic, mlp, gbdt"),
        (
            '[tasks.x]\non = "pay"\nkind = "regression"\nhead = ["mlp", "mlp"]',
            "tasks.x.head",
            "['mlp', 'mlp']",
            "one or several of linear, mlp, gbdt, each once",
        ),
        (
            '[tasks.x]\non = "pay"\nhead = "mlp"\nleave_out = { gbdt = ["payments"] }',
            "tasks.x.leave_out",
            "'gbdt'",
            "parts of the head: mlp",
        ),
        (
            '[tasks.x]\non = "pay"\nleave_out = { logistic = ["amount"] }',
            "tasks.x.leave_out.logistic",
            "'amount'",
            "what the head sees: ['channels', ",
        ),
        (
            '[tasks.x]\non = "pay"\ninputs = ["amount"]\nleave_out = { logistic = ["amount", "amount"] }',
            "tasks.x.leave_out.logistic",
            "['amount', 'amount']",
            "every name once, and not all",
        ),
        (
            '[tasks.x]\non = "pay"\nstandardise_again = [1_000, 500]',
            "tasks.x.standardise_again",
            "[1000, 500]",
            "numbers that rise, all above tasks.x.standardise_after = 500",
        ),
        ('[tasks.x]\non = "pay"\nstandardise_again = [500]', "tasks.x.standardise_again", "[500]", "all above"),
        ('[tasks.x]\non = "pay"\ninputs = ["note"]', "tasks.x.inputs", "'note'", "a number field of pay"),
        ('[pretrain]\ntargets = ["pay.amount"]', "pretrain.targets", "'pay.amount'", "['offer.product'"),
        ('[[memory]]\nname = "payments"\nmodality = "pay"\nkind = "count"', "memory.name", "'payments'", "no other"),
        ('[[memory]]\nname = "m"\nmodality = "x"\nkind = "count"', "memory[m].modality", "'x'", "['offer', 'pay']"),
        ("[modalities.pay]\nttl_s = 0", "modalities.pay.ttl_s", "0", "> 0"),
        ('[modalities.pay]\nttl_s = "1 day"', "modalities.pay.ttl_s", "'1 day'", "`float | null`"),
        (
            "[modalities.pay]\nttl_s = 60\n[store]\nttl_s = 200_000_000",
            "store.ttl_s",
            "200000000.0",
            "at most four years (126144000 s) above the shortest time to live, 60.0 s",
        ),
        (
            '[[memory]]\nname = "m"\nmodality = "pay"\nkind = "sum"\nfield = "merchant"',
            "memory[m].field",
            "'merchant'",
            "a number field of pay: ['amount']",
        ),
        (
            '[[memory]]\nname = "m"\nmodality = "pay"\nkind = "sum"\nfield = "amount"\nby = "channel"',
            "memory[m].by",
            "'channel'",
            "with declared `values`",
        ),
        (
            '[[memory]]\nname = "m"\nmodality = "pay"\nkind = "count"\nwhere = { field = "amount" }',
            "memory[m].where",
            "[]",
            "exactly one of above, below, equals",
        ),
    ],
)
def test_a_wrong_setting_is_refused_by_name_value_and_remedy(extra: str, name: str, value: str, accepted: str) -> None:
    # Given settings with one wrong entry, when they are read
    with pytest.raises(SettingsError) as refused:
        parse(SETTINGS + "\n" + extra)
    # Then the error says which, what it was and what would do
    text = str(refused.value)
    assert name in text
    assert value in text
    assert accepted in text


@pytest.mark.parametrize(
    ("extra", "store_ms", "event_ms"),
    [
        ("", None, ()),
        ("[store]\nttl_s = 60", 60_000, ()),
        ("[modalities.pay]\nttl_s = 60", None, (60_000, None)),
        ("[modalities.offer]\nttl_s = 1.5\n[store]\nttl_s = 60", 60_000, (60_000, 1_500)),
        # All the same is one for all
        ("[modalities.pay]\nttl_s = 5\n[modalities.offer]\nttl_s = 5\n[store]\nttl_s = 60", 5_000, ()),
        ("[modalities.pay]\nttl_s = 60\n[store]\nttl_s = 60", 60_000, ()),
    ],
)
def test_times_to_live_are_those_of_modalities_or_else_of_the_store(
    extra: str, store_ms: int | None, event_ms: tuple[int | None, ...]
) -> None:
    assert row_ttls(parse(SETTINGS + "\n" + extra)) == (store_ms, event_ms)


def test_the_environment_overrides_the_file() -> None:
    settings = parse(
        SETTINGS,
        {
            "LIVESTATE_KAFKA__BOOTSTRAP_SERVERS": "kafka:9092",
            "LIVESTATE_WORKER__HTTP_PORT": "7000",
            "LIVESTATE_STORE__TTL_S": "3600.5",
            "LIVESTATE_MODALITIES__PAY__TTL_S": "7200",
            "LIVESTATE_TASKS__ACCEPTED__PRIOR_VARIANCE": "0.5",
            "LIVESTATE_MODALITIES__PAY__FIELDS__AMOUNT__MAX": "5",
            "UNRELATED": "1",
        },
    )
    assert settings.kafka.bootstrap_servers == "kafka:9092"
    assert settings.worker.http_port == 7000
    assert settings.store.ttl_s == 3600.5
    assert settings.modalities["pay"].ttl_s == 7200.0
    assert settings.tasks["accepted"].prior_variance == 0.5
    assert settings.modalities["pay"].fields["amount"].max == 5.0


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LIVESTATE_WORKR__HTTP_PORT", "1", "there is no setting 'workr.http_port'; accepted here: kafka"),
        ("LIVESTATE_WORKER__PORT", "1", "there is no setting 'worker.port'; accepted here: batch_records"),
        ("LIVESTATE_WORKER__HTTP_PORT", "many", "Expected `int`"),
        ("LIVESTATE_WORKER__HTTP_PORT", "70000", "<= 65535"),
        ("LIVESTATE_KAFKA__SASL_MECHANISM", "SCRAM", "expected one of PLAIN, SCRAM-SHA-256, SCRAM-SHA-512"),
    ],
)
def test_a_wrong_environment_variable_is_refused_by_name(variable: str, value: str, expected: str) -> None:
    with pytest.raises(SettingsError) as refused:
        parse(SETTINGS, {variable: value})
    assert variable in str(refused.value)
    assert expected in str(refused.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"nothing\.toml"):
        load(tmp_path / "nothing.toml", {})
    broken = tmp_path / "broken.toml"
    broken.write_text("[worker\n")
    with pytest.raises(SettingsError, match=r"broken\.toml is not valid TOML"):
        load(broken, {})
