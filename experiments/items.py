"""The tables and figures that ``./reproduce.sh`` makes, in the order in which it makes them."""

from experiments.ours import accuracy_curves, accuracy_table, budgets, size, speed
from experiments.paper import curves, figure4, table1, table2, table3
from experiments.results import Item

PAPER = (
    Item("table1", "Table 1: ablation, 75 % transformer sparsity asked for", table1.SWEEPS, table1.make),
    Item("figure1", "Figure 1: WER over sparsity, base model", curves.sweeps("base"), curves.make),
    Item("figure2", "Figure 2: WER over sparsity, large model", curves.sweeps("large"), curves.make),
    Item("figure3", "Figure 3: WER over sparsity, WavLM", curves.sweeps("wavlm"), curves.make),
    Item("figure4", "Figure 4: one-shot WER over sparsity, three large models", figure4.SWEEPS, figure4.make),
    Item("table2", "Table 2: WER and parameters, 85 % transformer sparsity asked for", table2.SWEEPS, table2.make),
    Item("table3", "Table 3: time to compress", table3.SWEEPS, table3.make),
)
OURS = (
    Item(
        "accuracy_table",
        "Accuracy table: one-shot methods, at the sparsities asked for",
        accuracy_table.SWEEPS,
        accuracy_table.make,
        hours=True,
    ),
    Item(
        "accuracy_curves",
        "Accuracy curves: WER over sparsity, the paper's method and the presets",
        accuracy_curves.SWEEPS,
        accuracy_curves.make,
        hours=True,
    ),
    Item(
        "size",
        "Size: WER over bytes on disk, pruned, quantised and both",
        size.SWEEPS,
        size.make,
        size.measure,
        hours=True,
    ),
    Item("budgets", "Budgets: the best model that fits", budgets.SWEEPS, budgets.make, hours=True),
    Item("speed", "Speed: compressed models on a CPU", speed.SWEEPS, speed.make, speed.measure),
)
ITEMS = {item.name: item for item in (*PAPER, *OURS)}
