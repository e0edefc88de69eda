"""Figure 1: wav2vec2-base-100h at 10 % to 90 %."""

from experiments.paper.curves import curve_item

ITEM = curve_item("figure1", "base", "wav2vec2-base-100h")
