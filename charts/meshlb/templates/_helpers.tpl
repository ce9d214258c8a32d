{{- define "meshlb.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 40 | trimAll "-" }}
{{- end }}

{{- /* Prefix of object names: short enough for what is appended to it. Names of Services begin with a letter and have no dots, as releases' may. */}}
{{- define "meshlb.fullname" -}}
{{- $name := include "meshlb.name" . }}
{{- $release := .Release.Name | replace "." "-" }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 40 | trimAll "-" }}
{{- else if not (regexMatch "^[a-z]" $release) }}
{{- printf "%s-%s" $name $release | trunc 40 | trimAll "-" }}
{{- else if contains $name $release }}
{{- $release | trunc 40 | trimAll "-" }}
{{- else }}
{{- printf "%s-%s" $release $name | trunc 40 | trimAll "-" }}
{{- end }}
{{- end }}

{{- /* Cluster-wide objects carry the namespace too, or releases of one name would take each other's. */}}
{{- define "meshlb.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "meshlb.fullname" .) }}
{{- end }}

{{- define "meshlb.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: meshlb
{{ include "meshlb.instanceLabels" . }}
{{- end }}

{{- define "meshlb.instanceLabels" -}}
app.kubernetes.io/name: {{ include "meshlb.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- /* A map as YAML, made of several: of a key that comes twice the later value counts, and null takes it away. */}}
{{- define "meshlb.merged" -}}
{{- $out := dict }}
{{- range . }}
{{- range $key, $value := . }}{{ $_ := set $out $key $value }}{{ end }}
{{- end }}
{{- range $key, $value := $out }}
{{- if kindIs "invalid" $value }}{{ $_ := unset $out $key }}{{ end }}
{{- end }}
{{- toYaml $out }}
{{- end }}

{{- define "meshlb.agent.selector" -}}
{{ include "meshlb.instanceLabels" . }}
app.kubernetes.io/component: agent
{{- end }}

{{- define "meshlb.controller.selector" -}}
{{ include "meshlb.instanceLabels" . }}
app.kubernetes.io/component: controller
{{- end }}

{{- define "meshlb.agent.serviceAccount" -}}
{{- with .Values.agent.serviceAccount }}{{ .name | default (ternary (printf "%s-agent" (include "meshlb.fullname" $)) "default" .create) }}{{ end }}
{{- end }}

{{- define "meshlb.controller.serviceAccount" -}}
{{- with .Values.controller.serviceAccount }}{{ .name | default (ternary (printf "%s-controller" (include "meshlb.fullname" $)) "default" .create) }}{{ end }}
{{- end }}

{{- define "meshlb.uninstall.serviceAccount" -}}
{{- .Values.uninstall.serviceAccountName | default (printf "%s-uninstall" (include "meshlb.fullname" .)) }}
{{- end }}

{{- define "meshlb.image" -}}
{{- with .Values.image }}{{ .repository }}{{ if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}{{ end }}
{{- end }}

{{- /* ADDRESS:PORT of a role's values. */}}
{{- define "meshlb.listen" -}}
{{- if contains ":" .address }}[{{ .address }}]{{ else }}{{ .address }}{{ end }}:{{ .port }}
{{- end }}

{{- /* The --config files. An empty list is a flag that is not given, and so is null; only of publish-reserved it is a value, `none`. */}}
{{- define "meshlb.config" -}}
{{- range $flag, $value := . }}
{{- if not (or (kindIs "invalid" $value) (and (kindIs "slice" $value) (empty $value) (ne $flag "publish-reserved"))) }}
{{ $flag }}: {{ $value | toJson }}
{{- end }}
{{- end }}
{{- end }}

{{- define "meshlb.agent.config" -}}
{{- $own := dict
  "metrics-listen" (include "meshlb.listen" .Values.agent.metrics)
  "proc-sys" "/host/proc/sys"
  "run-dir" "/run/meshlb"
  "state-dir" "/var/lib/meshlb" }}
{{- include "meshlb.config" (merge $own .Values.config) | trim }}
{{- end }}

{{- define "meshlb.controller.config" -}}
{{- $own := dict "metrics-listen" (include "meshlb.listen" .Values.controller.health) }}
{{- include "meshlb.config" (merge $own .Values.config) | trim }}
{{- end }}

{{- /* Whether the API server is given by a name, which DNS has to answer. */}}
{{- define "meshlb.apiServerByName" -}}
{{- with .Values.apiServer.host }}{{ if not (or (contains ":" .) (regexMatch "^[0-9.]+$" .)) }}true{{ end }}{{ end }}
{{- end }}

{{- define "meshlb.apiServerEnv" -}}
{{- with .Values.apiServer }}{{ if .host }}
- name: KUBERNETES_SERVICE_HOST
  value: {{ .host | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ .port | quote }}
{{- end }}{{ end }}
{{- end }}

{{- /* PodMonitor: the name that Prometheus gives the job. */}}
{{- define "meshlb.job" -}}
{{ .Release.Namespace }}/{{ include "meshlb.fullname" . }}
{{- end }}
