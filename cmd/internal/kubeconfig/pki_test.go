package kubeconfig_test

import (
	"encoding/pem"
	"net/http/httptest"
	"testing"
)

// testCA returns the PEM of a certificate.
func testCA(t *testing.T) []byte {
	t.Helper()
	s := httptest.NewTLSServer(nil)
	defer s.Close()
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
}
