"""The devices that a trial may ask for, and the peak speeds of known GPUs. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

DEVICES = ("cpu", "cuda", "auto")
UTILISATION = 0.3  # share of the peak that a plan assumes; a small model reaches far less


@dataclass(frozen=True)
class Peak:
    """Peak rates of dense matrix products, TFLOP/s, without sparsity.

    bfloat16: with float32 sums; None if the GPU has no bfloat16 units. float32: without TF32; None if it is not listed.
    """

    bfloat16: float | None
    float32: float | None = None

    def rate(self, precision: str) -> float:
        """Return the rate at `float32` or `bfloat16`, TFLOP/s; a GPU without bfloat16 units computes in float32."""
        found = (self.bfloat16 or self.float32) if precision == "bfloat16" else self.float32
        assert found is not None
        return found


# by a part of the name that torch gives the device; the first row that fits counts
PEAKS: dict[str, Peak] = {
    "T4": Peak(None, 8.1),  # NVIDIA T4 data sheet
    "V100": Peak(None, 15.7),  # NVIDIA V100 data sheet
    "RTX 4090": Peak(165.2, 82.6),  # NVIDIA Ada architecture white paper, appendix A
    "RTX 3090": Peak(71.0),  # NVIDIA Ampere GA102 white paper, appendix A
    "L40S": Peak(362.0),  # NVIDIA L40S data sheet: 733 with sparsity
    "L4": Peak(121.0, 30.3),  # NVIDIA L4 data sheet: 242 with sparsity
    "A100": Peak(312.0, 19.5),  # NVIDIA A100 data sheet
    "A10": Peak(125.0),  # NVIDIA A10 data sheet
    "H100 PCIe": Peak(756.0),  # NVIDIA H100 data sheet: 1,513 with sparsity
    "H100": Peak(989.0, 67.0),  # NVIDIA H100 data sheet, SXM: 1,979 with sparsity
    "H200": Peak(989.0, 67.0),  # NVIDIA H200 data sheet: 1,979 with sparsity
}


def peak_tflops(device: str) -> float | None:
    """Return the bfloat16 peak of a device by the name that torch gives it, TFLOP/s; None if it is not known."""
    return next((peak.bfloat16 for part, peak in PEAKS.items() if part in device), None)


def utilisation(flops_per_token: int, tokens_per_second: float, device: str) -> float | None:
    """Return the model FLOPs utilisation: the FLOPs that the model needs, over the device's bfloat16 peak.

    Source: Chowdhery et al. 2022, arXiv 2204.02311, appendix B. None if the device's peak is not known.
    """
    peak = peak_tflops(device)
    return None if peak is None else flops_per_token * tokens_per_second / (peak * 1e12)
