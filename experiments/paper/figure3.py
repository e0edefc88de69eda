"""Figure 3: wavlm-base-plus-100h at 10 % to 90 %."""

from experiments.paper.curves import curve_item

ITEM = curve_item("figure3", "wavlm", "wavlm-base-plus-100h")
