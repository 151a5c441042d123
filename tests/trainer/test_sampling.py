"""Learning from a share of the negatives keeps predictions calibrated; poison examples go to dead-letters."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stream.errors import RecordError, SettingsError
from stream.metrics import TrainerMetrics
from stream.model.heads import Head
from stream.model.parameters import ParameterSet
from stream.settings import Task, parse
from stream.wire import FeedbackRecord, decode_feedback, encode_feedback
from trainer.evaluation import auc, expected_calibration_error
from trainer.learner import TaskLearner
from trainer.sampling import NegativeSampling
from trainer.timeline import Record

from . import shop
from .shop import START_MS, answer, open_trainer, outcome, records, send

WIDTH = 3


def draws(n: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Inputs and labels of a logistic model under which one in ten is positive."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(n, WIDTH)).astype(np.float32)
    chance = 1.0 / (1.0 + np.exp(2.8 - x @ np.array([1.0, -0.7, 0.3])))
    return x, random.random(n) < chance


def taught(head: str, rate: float, corrected: bool) -> tuple[float, float]:
    """(calibration error, AUC) on other draws, of a head that learned from a share of the negatives."""
    head_settings: Task = parse(
        f"[modalities.send]\n[tasks.t]\non = 'send'\nhead = '{head}'\nprior_variance = 1.0\nstandardise_after = 200\n"
        "mlp = { hidden = 8, dropout = 0.0, hidden_dropout = 0.0, learning_rate = 0.02, average = 0.98 }\n"
        "gbdt = { least_examples = 200, refit_interval_s = 1, delay_s = 0, leaf_examples = 50, trees = 60, "
        "learning_rate = 0.1 }\n"
    ).tasks["t"]
    learner = TaskLearner("t", np.zeros(WIDTH, np.bool_), head_settings)
    sampling = NegativeSampling("t", rate, 0)
    x, labels = draws(5000, 0)
    for i in range(len(x)):
        learner.observe(x[i])
        if labels[i] or sampling.keeps(b"c", i):
            offset = sampling.log_odds_offset if corrected else 0.0
            learner.learn(x[i], bool(labels[i]), 1.0, 0.1, 0, log_odds_offset=offset, final_ms=i)
    others, truth = draws(20_000, 1)
    said = Head("t", head_settings, ParameterSet(learner.head()), np.ones(WIDTH, np.bool_)).predict(others)[:, 0]
    learner.close()
    return expected_calibration_error(truth, said), auc(truth, said)


@pytest.mark.parametrize("head", ["logistic", "mlp", "gbdt"])
def test_the_correction_keeps_predictions_calibrated_where_negatives_are_a_sample(head: str) -> None:
    # Given heads that learned from a fifth of the negatives, with and without the correction, and from all of them
    everything, ranked = taught(head, 1.0, True)
    corrected, ranked_corrected = taught(head, 0.2, True)
    plain, _ = taught(head, 0.2, False)
    # Then without it predictions are far too high, and with it about as calibrated as those of all
    assert plain > 0.12
    assert corrected < everything + 0.02
    # And the ranking suffers little
    assert ranked_corrected > ranked - 0.02


def test_what_is_kept_is_a_share_that_grows_with_the_rate_and_depends_on_the_seed() -> None:
    def kept(rate: float, seed: int = 0, task: str = "t") -> set[int]:
        sampling = NegativeSampling(task, rate, seed)
        return {i for i in range(20_000) if sampling.keeps(b"client-%d" % (i % 700), START_MS + i)}

    quarter, half = kept(0.25), kept(0.5)
    assert len(quarter) == pytest.approx(5000, abs=300)
    assert len(half) == pytest.approx(10_000, abs=350)
    assert quarter < half < kept(1.0) == set(range(20_000))
    assert kept(0.25) == quarter
    for other in (kept(0.25, seed=1), kept(0.25, task="u")):
        assert len(other & quarter) == pytest.approx(1250, abs=200)


def test_the_trainer_leaves_out_negatives_alone_and_judges_all(tmp_path: Path) -> None:
    # Given a rate of a quarter, and 200 answers, half of them positive
    metrics = TrainerMetrics()
    settings = shop.settings(TASKS__REDEEMED__NEGATIVE_RATE="0.25", TASKS__REDEEMED__STANDARDISE_AFTER="2")
    trainer = open_trainer(tmp_path / "t", settings, metrics)
    clients = [f"c{i}" for i in range(200)]
    trainer.apply_events(records([(c, send(c, START_MS + i)) for i, c in enumerate(clients)]))
    learner = trainer.learners["redeemed"]
    trainer.apply_feedback(records([(c, answer(c, START_MS + i, i % 2 == 0)) for i, c in enumerate(clients)]))
    # Then all positives are learned, and about a quarter of the negatives; the others are counted
    left_out = metrics.registry.get_sample_value("livestate_negatives_sampled_out_total", {"task": "redeemed"})
    assert left_out is not None
    assert 60 < left_out < 90
    assert learner.labels == 200 - left_out
    assert outcome(metrics, "joined") == 200
    trainer.close()


def test_a_rate_for_other_than_binary_labels_is_refused() -> None:
    with pytest.raises(SettingsError, match="only binary labels are"):
        parse("[modalities.send]\n[tasks.t]\non = 'send'\nkind = 'regression'\nnegative_rate = 0.5\n")


def test_a_poison_example_goes_to_dead_letters_and_nothing_else_is_lost(tmp_path: Path) -> None:
    # Given three predictions
    refused: list[tuple[Record, RecordError]] = []
    metrics = TrainerMetrics()
    settings = shop.settings(TASKS__REDEEMED__STANDARDISE_AFTER="2")
    trainer = open_trainer(tmp_path / "t", settings, metrics, lambda record, error: refused.append((record, error)))
    trainer.apply_events(records([(c, send(c, START_MS)) for c in ("ann", "eve", "bob")]))
    # When all three are answered, one with a weight beyond what its update can hold
    poison = encode_feedback(FeedbackRecord("eve", START_MS + 1, START_MS, "redeemed", True, 1e308))
    answers = [("ann", answer("ann", START_MS, True)), ("eve", poison), ("bob", answer("bob", START_MS, False))]
    trainer.apply_feedback(records(answers))
    # Then the poison one is dropped, counted, and sent with the reason, as feedback that can be read
    assert trainer.learners["redeemed"].labels == 2
    assert metrics.registry.get_sample_value("livestate_examples_dropped_total", {"task": "redeemed"}) == 1
    assert metrics.registry.get_sample_value("livestate_dead_letters_total", {"reason": "not_finite"}) == 1
    ((record, error),) = refused
    assert error.reason == "not_finite"
    assert f"task = 'redeemed', as_of_ms = {START_MS}" in str(error)
    sent = decode_feedback(record.key, record.value, record.headers, settings)
    assert (sent.client_id, sent.as_of_ms, sent.label) == ("eve", START_MS, True)
    assert all(np.isfinite(tensor).all() for tensor in trainer.tensors().values())
    trainer.close()
