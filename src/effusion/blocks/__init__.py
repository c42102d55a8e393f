"""Floor 3: encode, prepare, denoise, decode: functions over protocols."""
