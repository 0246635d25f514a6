"""How a call is computed: its plan, the autograd Functions, both backends, and the operators for traced calls."""
