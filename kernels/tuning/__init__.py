"""Which tile a kernel runs with: measured tables, shipped tables, and a rule without any."""
