"""Random vision models, plain ones and ones with traps, rewritten and compared with oracles of their own.

Each model follows from one number. `transform` must refuse it, or give what its oracle gives, which shares no code with
papr_fx's rewriting or proof: the model's own parts, computed on the tokens that are left.
"""
