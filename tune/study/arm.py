"""An arm of a study file: the activation of its model, and its gate strength."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pagating.gating.catalog import (
    ALPHA_KINDS,
    BASES,
    COMPETITORS,
    DEFAULTS,
    FORMS,
    LARGEST_ALPHA,
    LAYER_BOUND,
    OWN_CODE,
    PER,
    RANGES,
    STUDY_GATES,
    OwnCode,
    own_code,
)
from tune.study.sections import Distribution, OneOf, Section

WITH_ALPHA = [name for name, row in COMPETITORS.items() if row.has_alpha]
LEARNABLE, TOKEN = ALPHA_KINDS["learnable"], ALPHA_KINDS["token"]
STUDY_FORMS = [name for name, form in FORMS.items() if form.in_study]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _strength(alpha: Any) -> str:
    return f"{alpha:g}" if isinstance(alpha, float) else "alpha"


def _positive(multiplier: float | Distribution) -> None:
    if isinstance(multiplier, float) and not multiplier > 0:
        raise ValueError(f"lr_multiplier={multiplier} is not positive")


class Learnable(Section):
    """An alpha that is learned: one number for the model, per layer or per channel."""

    init: float = Field(
        LEARNABLE["init"], ge=0, le=LARGEST_ALPHA, description="initial value; in (0, 1) for range: unit"
    )
    per: Annotated[str, OneOf(PER)] = Field(
        LEARNABLE["per"], description="part of the model that has a number of its own"
    )
    range: Annotated[str, OneOf(RANGES)] = Field(
        LEARNABLE["range"], description="unit: the sigmoid of a logit, in (0, 1); free: any number"
    )
    lr_multiplier: float | Distribution = Field(
        LEARNABLE["lr_multiplier"], description="learning rate of alpha as a multiple of the model's"
    )

    @model_validator(mode="after")
    def _start(self) -> Learnable:
        if self.range == "unit" and not 0 < self.init < 1:
            raise ValueError(f"init={self.init}: a sigmoid cannot start at 0, at 1 or beyond; give a value in (0, 1)")
        _positive(self.lr_multiplier)
        return self


class AlphaSchedule(Section):
    """An alpha that changes from one value to another during training: exactly one of the two keys."""

    linear: list[float] | None = Field(None, description="[start, end], linear in the steps")
    cosine: list[float] | None = Field(None, description="[start, end], along half a cosine")

    @property
    def kind(self) -> str:
        """Name of the schedule."""
        return "linear" if self.linear is not None else "cosine"

    @property
    def ends(self) -> list[float]:
        """Alpha at the start and at the end of training."""
        return self.linear or self.cosine or []

    @model_validator(mode="after")
    def _one(self) -> AlphaSchedule:
        if (self.linear is None) == (self.cosine is None):
            raise ValueError("give exactly one of linear and cosine")
        if len(self.ends) != 2 or not all(0 <= value <= LARGEST_ALPHA for value in self.ends):
            raise ValueError(f"{self.kind} {self.ends} must be two numbers in [0, 2], [start, end]")
        return self


class TokenAlpha(Section):
    """An alpha per token: sigmoid(w.x + c), with w = 0 at the start. It has d_ff + 1 parameters per layer."""

    init: float = Field(TOKEN["init"], gt=0, lt=1, description="initial value of every token's alpha")
    lr_multiplier: float | Distribution = Field(
        TOKEN["lr_multiplier"], description="learning rate of w and c as a multiple of the model's"
    )

    @model_validator(mode="after")
    def _rate(self) -> TokenAlpha:
        _positive(self.lr_multiplier)
        return self


class AlphaSearch(Distribution):
    """The range in which an arm's own search tunes alpha: exactly one of the three distributions."""

    per: Literal["model", "layer"] = Field(
        "model", description="layer: one hyperparameter per layer, alpha_0, alpha_1, ..., all with this distribution"
    )

    def named(self, mlps: int) -> dict[str, Distribution]:
        """Return the alpha hyperparameters of a model with `mlps` MLPs, by name."""
        names = ["alpha"] if self.per == "model" else [f"alpha_{layer}" for layer in range(mlps)]
        return dict.fromkeys(names, self)


class AlphaSection(Section):
    """An alpha that is not a plain number: exactly one of the four keys."""

    search: AlphaSearch | None = Field(None, description="a hyperparameter of the arm's own search, or one per layer")
    learnable: Learnable | None = Field(None, description="a parameter that is trained with the model")
    schedule: AlphaSchedule | None = Field(None, description="changed from one value to another during training")
    token: TokenAlpha | None = Field(None, description="computed from the features of each token")

    @model_validator(mode="after")
    def _one(self) -> AlphaSection:
        kinds = list(type(self).model_fields)
        if sum(getattr(self, kind) is not None for kind in kinds) != 1:
            raise ValueError(f"give exactly one of {', '.join(kinds[:-1])} and {kinds[-1]}")
        return self

    @property
    def start(self) -> float | None:
        """Alpha before the first step; None if it is searched."""
        if self.schedule:
            return self.schedule.ends[0]
        trained = self.learnable or self.token
        return trained.init if trained else None

    def spec(self, config: dict[str, float]) -> Any:
        """Return the argument of `pagating.gating.alpha.parse` for one configuration."""
        if self.search and self.search.per == "model":
            return config["alpha"]
        if self.search:
            return [config[name] for name in self.search.named(len(config)) if name in config]
        if self.schedule:
            start, end = self.schedule.ends
            return {"schedule": {"kind": self.schedule.kind, "from": start, "to": end}}
        kind, trained = ("learnable", self.learnable) if self.learnable else ("token", self.token)
        assert trained is not None
        multiplier = config.get("alpha_lr_multiplier", trained.lr_multiplier)
        return {kind: {**trained.model_dump(), "lr_multiplier": multiplier}}


class Arm(Section):
    """One alternative under comparison. An arm without gate and unit is the stock model."""

    baseline: bool = Field(False, description="the arm that the others are compared with: exactly one")
    floor: bool = Field(False, description="the control that must lose: at most one")
    gate: str | None = Field(None, description=f"{_listed(STUDY_GATES)}, or a gate of your own: `FILE.py:NAME`")
    base: Annotated[str, OneOf(BASES)] = Field(
        DEFAULTS["base"], description="activation that remains when the gate is off"
    )
    alpha: float | list[float] | AlphaSection | None = Field(
        None,
        description="gate strength: a number in [0, 2], a list with one number in [-10, 10] per layer, or "
        "{search: ...}, {learnable: ...}, {schedule: ...}, {token: ...}",
    )
    form: Annotated[str, OneOf(STUDY_FORMS)] = Field(
        DEFAULTS["form"],
        description="place of the gate. pointwise: on the activation. glu: on two projections of width 2/3 d_ff, which "
        "keeps the number of parameters. projected: on two more layers of d_ff x d_ff after the MLP's first, as in the "
        "published code",
    )
    unit: str | None = Field(
        None,
        description=f"an activation instead of gate, base and form: {_listed(COMPETITORS)}, or one of your own: "
        f"`FILE.py:NAME`, a function or a module; {_listed(WITH_ALPHA)} may have an alpha",
    )

    @field_validator("gate")
    @classmethod
    def _gate(cls, given: str | None) -> str | None:
        if given is None or given in STUDY_GATES or OWN_CODE.fullmatch(given):
            return given
        raise ValueError(f"gate '{given}' is not one of {', '.join(STUDY_GATES)}, nor FILE.py:NAME")

    @field_validator("unit")
    @classmethod
    def _unit(cls, given: str | None) -> str | None:
        if given is None or given in COMPETITORS or OWN_CODE.fullmatch(given):
            return given
        raise ValueError(f"unit '{given}' is not one of {', '.join(COMPETITORS)}, nor FILE.py:NAME")

    @model_validator(mode="after")
    def _whole(self) -> Arm:
        if self.unit is not None:
            self._check_unit(self.unit)
        elif (self.gate is None) != (self.alpha is None):
            raise ValueError("gate and alpha come together: give both, or neither (the stock model)")
        if self.form != "pointwise" and self.gate is None and self.unit is None:
            raise ValueError(f"form: {self.form} needs a gate and an alpha")
        if self.form != "pointwise" and self.base != "identity":
            raise ValueError(f"base: {self.base} has no meaning for form {self.form}: its gate multiplies a projection")
        if isinstance(self.alpha, float) and not 0 <= self.alpha <= LARGEST_ALPHA:
            raise ValueError(f"alpha={self.alpha} is outside [0, {LARGEST_ALPHA:g}]")
        for value in self.alpha if isinstance(self.alpha, list) else []:
            if not -LAYER_BOUND <= value <= LAYER_BOUND:  # a layer's learned alpha, frozen, is often negative
                raise ValueError(f"alpha={value} of a layer is outside [{-LAYER_BOUND:g}, {LAYER_BOUND:g}]")
        for name, where in self.searched().items():
            low, high = min(where.values), max(where.values)
            if low <= 0 if name == "alpha_lr_multiplier" else (low < 0 or high > LARGEST_ALPHA):
                allowed = f"alpha in [0, {LARGEST_ALPHA:g}], others above 0"
                raise ValueError(f"{name} is searched in {where.values}; allowed: {allowed}")
        if self.baseline and self.floor:
            raise ValueError("an arm cannot be both baseline and floor")
        return self

    def _check_unit(self, unit: str) -> None:
        settled = [key for key in ("gate", "base", "form") if key in self.changed()]
        if settled:
            raise ValueError(f"unit: {unit} settles {', '.join(settled)}; give one or the other")
        if isinstance(self.alpha, AlphaSection) and self.alpha.search and self.alpha.search.per == "layer":
            raise ValueError(f"unit: {unit} has one alpha for all layers; search.per: layer is for a gate")
        if self.alpha is not None and unit not in WITH_ALPHA:
            raise ValueError(f"unit: {unit} has no alpha; those that have: {', '.join(WITH_ALPHA)}")

    def changed(self) -> list[str]:
        """Return the keys whose value is not the default."""
        return [key for key, field in type(self).model_fields.items() if getattr(self, key) != field.default]

    @property
    def learns_alpha(self) -> bool:
        """True if alpha is a trained parameter of the model. Each evaluation then reports one alpha per layer."""
        if isinstance(self.alpha, AlphaSection):
            return self.alpha.learnable is not None or self.alpha.token is not None
        return self.alpha is None and self.unit in COMPETITORS and COMPETITORS[self.unit].learns_alpha

    @property
    def is_glu(self) -> bool:
        """True if the form or the unit makes the MLPs gated linear units."""
        return self.form == "glu" or (self.unit in COMPETITORS and COMPETITORS[self.unit].is_glu)

    @property
    def own_code(self) -> OwnCode | None:
        """The arm's gate or activation if it is the user's own."""
        return own_code({"gate": self.gate, "unit": self.unit})

    @property
    def formula(self) -> str:
        """Formula of the arm's activation. `x` is the pre-activation, `alpha` a strength that is no number."""
        if self.unit is not None:
            if self.own_code:
                return f"{self.own_code.name}(x)"
            row = COMPETITORS[self.unit]
            strength = _strength(row.settings["alpha"] if self.alpha is None else self.alpha)
            return re.sub(r"\balpha\b", strength, row.formula.partition("; ")[0])
        if self.gate is None:
            return "the stock activation"
        base = "gelu(x)" if self.base == "gelu" else "x"
        gate, strength = self.own_code.name if self.own_code else self.gate, _strength(self.alpha)
        rest = f"{1 - self.alpha:.6g}" if isinstance(self.alpha, float) else f"(1 - {strength})"
        if self.form != "pointwise":
            one, two = ("a", "b") if self.form == "glu" else ("A(x)", "B(x)")
            return f"{one} * {gate}({two})" if self.alpha == 1 else f"{one} * ({strength} * {gate}({two}) + {rest})"
        if self.alpha in (0, 1):
            return f"x * {gate}(x)" if self.alpha else base
        return f"{strength} * x * {gate}(x) + {rest} * {base}"

    def searched(self, mlps: int = 1) -> dict[str, Distribution]:
        """Return the scientific hyperparameters that this arm searches in a model with `mlps` MLPs, by name."""
        if not isinstance(self.alpha, AlphaSection):
            return {}
        if self.alpha.search:
            return self.alpha.search.named(mlps)
        trained = self.alpha.learnable or self.alpha.token
        multiplier = trained.lr_multiplier if trained else None
        return {"alpha_lr_multiplier": multiplier} if isinstance(multiplier, Distribution) else {}

    def arguments(self, config: dict[str, float]) -> dict[str, Any] | None:
        """Return the arguments of `pagating.patch` for one configuration; None for the stock model.

        `base: gelu` is the stock activation of the study's GPT-2, as the model section names it.
        """
        alpha = self.alpha.spec(config) if isinstance(self.alpha, AlphaSection) else self.alpha
        if self.unit is not None:
            return {"unit": self.unit} if alpha is None else {"unit": self.unit, "alpha": alpha}
        if self.gate is None:
            return None
        row = {"gate": self.gate, "alpha": alpha, "base": "stock" if self.base == "gelu" else self.base}
        return row if self.form == "pointwise" else {**row, "form": self.form}
