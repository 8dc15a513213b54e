"""The rank processes of one machine: started from a fork server, monitored, stopped; and what they leave behind."""
