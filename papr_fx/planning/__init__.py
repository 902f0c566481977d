"""Plans a rewrite by tokens or by pixels: traces the model, finds the sites, opens modules. Builds the module that is returned.

A `Plan` holds all decisions, so that another keep ratio is one more rewrite of the same dense graph. `transform` decides
whether tokens or pixels are pruned.
It must not know how a rewrite is proved, shown or timed.
"""
