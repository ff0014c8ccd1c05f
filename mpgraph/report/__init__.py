"""``explain`` and what stands behind it: records, their layout as text, and their difference."""
