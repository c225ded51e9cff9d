"""The direction, the unit and the kind of a metric, by its name."""

import pytest

from analysis.io.tables import metrics

LOWER = [
    "loss",
    "val_loss",
    "test/loss",
    "metrics.loss",
    "valLoss",
    "eval_loss",
    "nll",
    "test_nll",
    "error",
    "err",
    "top1_err",
    "top-5-error",
    "error_rate",
    "ppl",
    "perplexity",
    "bpb",
    "bits_per_byte",
    "CER",
    "wer",
    "mse",
    "RMSE",
    "mae",
    "fid",
    "brier_score",
    "negative_log_likelihood",
    "log_loss",
    "cross_entropy",
    "CrossEntropyLoss",
    "losses",
    "fpr",
    "lpips",
]
HIGHER = [
    "acc",
    "accuracy",
    "test_acc",
    "val/accuracy",
    "Accuracy@1",
    "acc@5",
    "f1",
    "macro_f1",
    "F1-score",
    "bleu",
    "BLEU-4",
    "rouge",
    "rougeL",
    "rougeLsum",
    "ROUGE-1",
    "auc",
    "roc_auc",
    "AUROC",
    "reward",
    "mean_reward",
    "ep_rew_mean",
    "score",
    "return",
    "episode_return",
    "elo",
    "mAP",
    "mAP50",
    "r2",
    "R^2",
    "psnr",
    "ndcg@10",
    "hits@10",
    "pass@1",
    "pass@k",
    "exact_match",
    "win_rate",
    "success_rate",
    "neg_mean_squared_error",
    "neg_log_loss",
    "log_likelihood",
    "squad_f1",
    "scores",
    "jaccard",
]
UNKNOWN = [
    "quux",
    "value",
    "metric",
    "loss_diff",
    "acc_drop",
    "1-acc",
    "-loss",
    "neg_reward",
    "accuracy_loss",
    "reward_loss",
    "loss_std",
    "policy_entropy",
    "perf",
    "time",
    "gap",
    "f1_loss",
    "map_size",
    "return_code",
]


@pytest.mark.parametrize(("names", "want"), [(LOWER, False), (HIGHER, True), (UNKNOWN, None)], ids=str)
def test_the_name_tells_the_direction_or_nothing(names, want):
    assert {name: metrics.higher_is_better(name) for name in names} == dict.fromkeys(names, want)


def test_only_a_likelihood_or_cross_entropy_is_in_nats():
    for name in ("nll", "val_nll", "metrics.test_nll", "cross_entropy", "valCrossEntropy", "ce", "loss_nats"):
        assert metrics.in_nats(name), name
    for name in ("loss", "val_loss", "mse", "acc", "bpb", "nll_bits", "nll_sum", "nll_std", "perplexity", "nullity"):
        assert not metrics.in_nats(name), name


def test_units():
    known = {"val_nll": "nats", "loss": "", "loss (nats)": "nats", "latency [ms]": "ms", "acc (%)": "%", "acc": ""}
    assert {name: metrics.unit(name) for name in known} == known
    assert metrics.unit("val_bpb") == "bits per byte"
