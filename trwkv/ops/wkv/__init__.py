"""Multi-perspective WKV: the RWKV-4 recurrence with several decays per channel."""
