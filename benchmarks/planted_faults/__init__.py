"""How much the proof and the suite see: small faults, planted one by one."""
