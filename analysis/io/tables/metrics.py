"""Tell from the name of a metric whether a higher value is better, and whether it is a loss in nats."""

import re


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LOWER = _words(
    "loss losses nll ce xent crossentropy bce error errors err ppl perplexity bpb bpc bpd bits nats wer cer mse rmse "
    "mae mape smape rmsle brier crps fid kid lpips kl regret cost eer ece fpr fnr logloss deviance misclassification "
    "latency hinge huber"
)
_HIGHER = _words(
    "acc accuracy f1 fscore fbeta bleu sacrebleu chrf rouge rougel rougelsum meteor cider auc auroc auprc aupr roc ap "
    "map reward rewards return returns elo precision recall iou miou dice psnr ssim mrr ndcg r2 kappa mcc em correct "
    "loglik likelihood loglikelihood logprob elbo elpd throughput winrate specificity sensitivity spearman pearson "
    "jaccard tpr"
)
_WEAK = frozenset(("score", "scores"))  # higher is better, unless another word says otherwise (brier score)
_PHRASES = (  # words in a row that mean something else together
    (("negative", "log", "likelihood"), "nll"),
    (("neg", "log", "likelihood"), "nll"),
    (("neg", "log", "lik"), "nll"),
    (("cross", "entropy"), "ce"),
    (("log", "loss"), "logloss"),
    (("log", "likelihood"), "loglikelihood"),
    (("log", "prob"), "logprob"),
    (("win", "rate"), "winrate"),
    (("success", "rate"), "accuracy"),
    (("solve", "rate"), "accuracy"),
    (("pass", "rate"), "accuracy"),
    (("failure", "rate"), "error"),
    (("exact", "match"), "em"),
    (("ep", "rew"), "reward"),
    (("episode", "rew"), "reward"),
    (("r", "2"), "r2"),
    (("r", "squared"), "r2"),
    (("f", "1"), "f1"),
    (("bits", "per"), "bpb"),
)
# words that turn a metric's meaning round, or make it another one
_TURNED = _words(
    "neg negative minus inv inverse inverted drop change delta diff difference gap decrease reduction increase "
    "improvement gain std stderr stdev sd sem var variance ratio rank weight coef scale lambda threshold "
    "target"
)
_NOUNS = frozenset(("size", "code", "count", "length", "time"))  # map_size and return_code are no metrics
_SHARES = _words("acc accuracy f1 auc auroc precision recall em winrate iou miou")
_NATS = frozenset(("nll", "ce", "xent", "nats"))
_COUNTED = frozenset(("pass", "top", "hit", "hits"))  # pass@1, top5, hits@10: higher is better, with a number


def words(name: str) -> list[str]:
    """Return the words of a metric's name in lower case: "val/crossEntropy" gives val, cross, entropy, and so "ce"."""
    bare = re.sub(r"[(\[].*?[)\]]", " ", name)
    bare = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[a-z])(?=[A-Z]{2,}\b)", " ", bare)
    found = [word for word in re.split(r"[^a-zA-Z0-9]+", bare.casefold()) if word]
    for phrase, word in _PHRASES:
        for i in range(len(found) - len(phrase) + 1):
            if tuple(found[i : i + len(phrase)]) == phrase:
                found[i : i + len(phrase)] = [word]
                break
    return found


def higher_is_better(name: str) -> bool | None:
    """Return whether a higher value of the metric is better; None if its name does not say."""
    found = words(name)
    stems = [w if w in _LOWER | _HIGHER else w.rstrip("0123456789") for w in found]
    down, up = any(s in _LOWER for s in stems), any(s in _HIGHER for s in stems)
    if not (down or up):
        up = any(s in _WEAK or (s in _COUNTED and re.search(r"[\d@]", name)) for s in stems)
    if down == up or found[-1] in _NOUNS:
        return None
    turned = [w for w in found if w in _TURNED] or re.match(r"\s*(1|100)?\s*[-\u2212]", name)
    if turned:  # scikit-learn writes neg_mean_squared_error for a score
        return True if down and found[0] == "neg" and not up else None
    return up


def is_share(name: str) -> bool:
    """Check by its name if a metric is a share of cases, which some write as a percentage."""
    return bool(_SHARES & {word.rstrip("0123456789") for word in words(name)} | _SHARES & set(words(name)))


def in_nats(name: str) -> bool:
    """Check by its name if a metric is a mean negative log-likelihood in nats."""
    found = words(name)
    stems = {w.rstrip("0123456789") for w in found}
    return bool(stems & _NATS) and not stems & (_TURNED | {"bits", "bit", "sum", "total"})


def unit(name: str) -> str:
    """Return the unit that a metric's name states, "" if it states none: nats, bits per byte, or text in brackets."""
    if found := re.search(r"[(\[]\s*([^\W\d][^)\]]{0,30}|%)\s*[)\]]\s*$", name):
        return found[1].strip()
    short = {"bpb": "bits per byte", "bpc": "bits per character"}
    return "nats" if in_nats(name) else next((short[w] for w in words(name) if w in short), "")
