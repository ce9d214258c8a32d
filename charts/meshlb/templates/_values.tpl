{{- /* Every template begins with this: it puts back what is needed of values that were set to null, and ends the rendering where values make no sense. */}}
{{- define "meshlb.values" -}}
{{- include "meshlb.filled" (list .Values (include "meshlb.defaults" . | fromYaml)) }}
{{- include "meshlb.checked" . }}
{{- end }}

{{- /* A group of values that is null is as values.yaml has it; of a group that is there each value is, but for those that Kubernetes or Prometheus
can do without. Of `config` only what the chart itself reads: other flags that are not given are the programs' defaults, which are the same. */}}
{{- define "meshlb.filled" -}}
{{- $values := first . }}
{{- range $key, $default := last . }}
{{- $value := index $values $key }}
{{- if has $key (list "tolerations" "priorityClassName" "resources" "interval") }}
{{- else if kindIs "invalid" $value }}
{{- $_ := set $values $key (deepCopy $default) }}
{{- else if kindIs "map" $default }}
{{- include "meshlb.filled" (list $value $default) }}
{{- end }}
{{- end }}
{{- end }}

{{- /* As in values.yaml, which templates can't read: a test holds the two together. */}}
{{- define "meshlb.defaults" -}}
image:
  repository: meshlb
  pullPolicy: IfNotPresent
crds:
  install: true
rbac:
  create: true
admissionPolicy:
  create: true
config:
  vip-cidr: ["10.200.0.0/16"]
  zone: mesh.internal
  dns-listen: [vip]
  resync: 300
apiServer:
  port: 6443
agent:
  metrics:
    address: 0.0.0.0
    port: 9477
  stateDir: /var/lib/meshlb
  tolerations:
    - operator: Exists
  priorityClassName: system-node-critical
  maxUnavailable: 10%
  terminationGracePeriodSeconds: 10
  resources:
    requests:
      cpu: 50m
      memory: 64Mi
    limits:
      memory: 512Mi
  serviceAccount:
    create: true
controller:
  replicas: 2
  health:
    address: 0.0.0.0
    port: 9477
  priorityClassName: system-cluster-critical
  terminationGracePeriodSeconds: 15
  resources:
    requests:
      cpu: 20m
      memory: 64Mi
    limits:
      memory: 256Mi
  podDisruptionBudget:
    enabled: true
  serviceAccount:
    create: true
uninstall:
  cleanup: true
  timeoutSeconds: 120
services:
  enabled: true
podMonitor:
  enabled: false
  interval: 30s
prometheusRule:
  enabled: false
networkPolicy:
  enabled: false
  apiServerPorts: [443, 6443]
{{- end }}

{{- /* What no schema can say: ends the rendering with what the programs would end with. */}}
{{- define "meshlb.checked" -}}
{{- $ranges := index .Values.config "vip-cidr" }}
{{- range $range := $ranges }}
{{- with include "meshlb.wrongRange" $range }}{{ fail (printf "config.vip-cidr: %s %s" $range .) }}{{ end }}
{{- end }}
{{- if and (eq (len $ranges) 2) (eq (contains ":" (first $ranges)) (contains ":" (last $ranges))) }}
{{- fail (printf "config.vip-cidr: %s and %s are of one family: at most one range for each of IPv4 and IPv6" (first $ranges) (last $ranges)) }}
{{- end }}
{{- range $flag := list "publish-range" "publish-reserved" }}
{{- $given := index $.Values.config $flag }}
{{- range $ports := kindIs "slice" $given | ternary $given (compact (list $given)) }}
{{- $ends := $ports | toString | splitList "/" | first | splitList "-" }}
{{- $low := include "meshlb.number" (first $ends) | int }}
{{- $high := include "meshlb.number" (last $ends) | int }}
{{- if or (lt $low 1) (gt $high 65535) (gt $low $high) }}
{{- fail (printf "config.%s: %v is no port and no range of ports: they go from 1 to 65535, the lower end first" $flag $ports) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- /* What is wrong with a range of virtual IPs. Of IPv6 what can be told from how it is written: templates can't count there. */}}
{{- define "meshlb.wrongRange" -}}
{{- $never := "is not a range for virtual IPs (loopback, multicast, link-local or unspecified)" }}
{{- $octet := "(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])" }}
{{- $prefix := include "meshlb.number" (splitList "/" . | last) | int }}
{{- if contains ":" . }}
{{- if gt $prefix 126 }}leaves no address for virtual IPs: an IPv6 range is a /126 at least, and a /112 usually
{{- else if eq $prefix 0 }}is too large: a /112 is usual
{{- else if regexMatch "(?i)^(::|(0{1,4}:){5})ffff:" . }}is an IPv4 range in IPv6 notation: write it as IPv4
{{- else if or (regexMatch "^[0:]+1?/" .) (and (regexMatch "(?i)^ff[0-9a-f]{2}:" .) (ge $prefix 8)) (and (regexMatch "(?i)^fe[89ab][0-9a-f]:" .) (ge $prefix 10)) }}{{ $never }}
{{- end }}
{{- else if not (regexMatch (printf "^%s([.]%s){3}/[0-9]+$" $octet $octet) .) }}is no range of IPv4 or IPv6 addresses
{{- else if gt $prefix 29 }}leaves no address for virtual IPs: an IPv4 range is a /29 at least, and a /16 usually
{{- else if eq $prefix 0 }}is too large: a /16 is usual
{{- else }}
{{- $network := include "meshlb.network" . | int64 }}
{{- $first := div $network 16777216 }}
{{- /* 43518 is 169.254. */}}
{{- if or (eq $first 0) (eq $first 127) (and (ge $first 224) (lt $first 240)) (eq (div $network 65536) 43518) }}{{ $never }}{{ end }}
{{- end }}
{{- end }}

{{- /* Digits as `int` takes them, which would read 010 as 8. */}}
{{- define "meshlb.number" -}}
{{- regexReplaceAll "^0+" . "" | default "0" }}
{{- end }}

{{- /* The first address of a range of IPv4 addresses, which may be given by any address in it, as a number. */}}
{{- define "meshlb.network" -}}
{{- $parts := splitList "/" . }}
{{- $number := 0 }}
{{- range first $parts | splitList "." }}{{ $number = add (mul $number 256) (int .) }}{{ end }}
{{- $size := 1 }}
{{- range until (int (sub 32 (include "meshlb.number" (last $parts) | int))) }}{{ $size = mul $size 2 }}{{ end }}
{{- sub $number (mod $number $size) }}
{{- end }}
