"""The simulator and the emulated fleet: the same verifier, drafters and policies, on traces, in virtual or real
time."""
