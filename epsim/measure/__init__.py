"""Real runs to measure: a decoder in torch, `decoder`, and the micro-benchmark of a device."""
