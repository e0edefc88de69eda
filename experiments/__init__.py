"""The paper's tables and figures: which sweeps make them, and how finished runs are read and drawn."""
