package main

import "text/template"

// Of a connection that is passed through, proxies read the ClientHello, and then splice. The
// backends choose cipher and curve.
var (
	balancerPassthroughTemplate = template.Must(template.New(ours).Parse(`listen: "{{.Listen}}"
mode: passthrough
admin:
  listen: "{{.Admin}}"
backends:
  caFile: "{{.CA}}"
  serverName: {{.ServerName}}
  servers:
{{- range .Backends}}
    - address: "{{.}}"
{{- end}}
log:
  level: warn
`))

	haproxyPassthroughTemplate = template.Must(template.New(reference).Parse(`global
    nbthread {{.Threads}}
defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    option splice-auto
frontend clients
    bind {{.Listen}}
    tcp-request inspect-delay 10s
    tcp-request content accept if { req_ssl_hello_type 1 }
    tcp-request content reject
    default_backend apiservers
backend apiservers
    balance leastconn
    option httpchk GET /readyz
    default-server check check-ssl check-alpn h2 check-proto h2 check-sni {{.ServerName}} inter 1s verify required ca-file {{.CA}}
{{- range $i, $address := .Backends}}
    server apiserver{{$i}} {{$address}}
{{- end}}
`))
)
