def spread_attention(kind, q, k, v, segments, window):
    raise AssertionError
