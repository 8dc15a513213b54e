"""Images in folders and archives: listing, decoding, statistics, archives and the cache in memory."""
