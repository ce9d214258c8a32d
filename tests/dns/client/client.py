"""client.py NAME: the addresses of a name as dnspython finds them, sorted, one a line; 1 and the error otherwise."""
import sys

import dns.exception
import dns.resolver

try:
    answer = dns.resolver.resolve(sys.argv[1], "A", search=True)
except dns.exception.DNSException as error:
    print(error)
    sys.exit(1)
print("\n".join(sorted(record.to_text() for record in answer)))
