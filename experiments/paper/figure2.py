"""Figure 2: wav2vec2-large-100h at 10 % to 90 %."""

from experiments.paper.curves import curve_item

ITEM = curve_item("figure2", "large", "wav2vec2-large-100h")
