{{/* How gateways find the workers of this release. */}}
{{- define "tandem.discovery" -}}
{{- range $role := list "prefill" "decode" }}
{{- $service := include "tandem.name" (dict "root" $ "component" $role) }}
{{- if eq $.Values.gateway.discovery "dns" }}
- --workers-dns={{ $role }}={{ $service }}.{{ $.Release.Namespace }}.svc.{{ $.Values.clusterDomain }}:7001
{{- else }}
- --workers-endpointslices={{ $role }}={{ $service }}
{{- end }}
{{- end }}
{{- if eq .Values.gateway.discovery "endpointslices" }}
- --kubernetes-namespace={{ .Release.Namespace }}
{{- end }}
{{- end -}}
