"""Turn configurations of other toolkits into recipes."""
