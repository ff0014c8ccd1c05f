"""What range of values a step needs: who left that of fp16, who would, and what to do."""
