"""What a workload would do on hardware that is not at hand: the production engine over a timed world."""
