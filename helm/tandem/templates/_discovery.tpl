{{/*
How gateways find the workers of this release. The name ends with a dot: it is looked up as it stands, and not first below
each search domain of the pod, one of which may answer for any name.
*/}}
{{- define "tandem.discovery" -}}
{{- range $role := list "prefill" "decode" }}
{{- $service := include "tandem.name" (dict "root" $ "component" $role) }}
{{- if eq $.Values.gateway.discovery "dns" }}
- --workers-dns={{ $role }}={{ $service }}.{{ $.Release.Namespace }}.svc.{{ $.Values.clusterDomain }}.:7001
{{- else }}
- --workers-endpointslices={{ $role }}={{ $service }}
{{- end }}
{{- end }}
{{- if eq .Values.gateway.discovery "endpointslices" }}
- --kubernetes-namespace={{ .Release.Namespace }}
{{- end }}
{{- end -}}
