"""Gradient boosting of scikit-learn on a small table: `pagating sweep docs/examples/sklearn_models.yaml`.

Each seed draws another split of the one table, which the study states as `resampling`. Its verdict then uses the
corrected variance of Nadeau and Bengio (2003). The budget is the number of trees.
"""

from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

X, Y = load_breast_cancer(return_X_y=True)


def train(trial):
    """Train one trial: an arm sets `depth`, that of its trees."""
    x, x_test, y, y_test = train_test_split(X, Y, test_size=0.2, stratify=Y, random_state=trial.seed)
    x, x_val, y, y_val = train_test_split(x, y, test_size=0.25, stratify=y, random_state=trial.seed)
    model = GradientBoostingClassifier(
        learning_rate=trial.learning_rate, max_depth=trial.depth, n_estimators=trial.budget, random_state=trial.seed
    ).fit(x, y)
    for trees, predicted in enumerate(model.staged_predict_proba(x_val), 1):
        if trees % 10 == 0 or trees == trial.budget:
            trial.report(trees, val_loss=log_loss(y_val, predicted))
    return {"test_loss": log_loss(y_test, model.predict_proba(x_test))} if trial.test else {}
