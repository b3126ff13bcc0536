"""Bookkeeping: who owns which cell, where the next tokens go, who sees whom. No MLX here."""
