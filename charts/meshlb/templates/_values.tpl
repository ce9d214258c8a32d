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
{{- if and (eq (len $ranges) 2) (eq (contains ":" (first $ranges)) (contains ":" (last $ranges))) }}
{{- fail (printf "config.vip-cidr: %s and %s are of one family: at most one range for each of IPv4 and IPv6" (first $ranges) (last $ranges)) }}
{{- end }}
{{- end }}
