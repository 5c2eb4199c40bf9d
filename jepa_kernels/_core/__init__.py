"""What every op shares: choosing a backend, registering with torch, checking arguments. Knows no op."""
